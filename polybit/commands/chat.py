"""`polybit chat`: talk with a model for several turns, and change its width between them."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Annotated

from cyclopts import Parameter

from polybit.commands.flags import Json, keep
from polybit.options.chat import ChatOptions

PROMPT = "> "


def chat(
    model: str, /, *, options: Annotated[ChatOptions, Parameter(name="*")] = ChatOptions(), json: Json = None
) -> None:
    """Talk with MODEL (a polybit directory, any Hugging Face id or path, or tinychat).

    Type a message and Enter; /width w3 goes on at another width and shows what changes, /quit leaves, /help lists the
    rest. Lines may also be piped in.
    """
    typed = sys.stdin.isatty() and options.line is None
    if typed:
        print(f"Chatting with {model}. /width w3 changes the width, /help lists what else, /quit leaves.")
    from polybit.acts.chat import chat as act

    lines = None if options.line is not None else keyboard() if typed else piped()
    run = act(model, options, lines=lines, say=partial(print, end="", flush=True))
    keep(run, json)


def keyboard() -> Iterator[str]:
    """Lines of a terminal, with history and editing where Python has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            print()
            return


def piped() -> Iterator[str]:
    """Lines of a pipe or a file; bytes that are no UTF-8 become U+FFFD."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    yield from sys.stdin
