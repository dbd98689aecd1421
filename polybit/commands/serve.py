"""`polybit serve`: answer requests over HTTP, each at its own precision."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import fields
from typing import Annotated

from cyclopts import Parameter

from polybit.options.serve import ServeOptions

PREFIX = "POLYBIT_SERVE_"


def serve(model: str, /, *, options: Annotated[ServeOptions, Parameter(name="*")] = ServeOptions()) -> None:
    """Serve MODEL (a polybit directory, any Hugging Face id or path, or tinychat) over HTTP until Ctrl-C.

    Speaks OpenAI's chat, completions and responses and Anthropic's messages. The width is chosen by the model's name
    (NAME@w4, NAME@auto) or by the field "precision". A page to chat with stands at /.
    """
    from polybit.acts.serve import serve as act

    for name in unread(os.environ):
        print(f"polybit: {name} is set, and no flag of serve has this name: it changes nothing", file=sys.stderr)
    act(model, options)


def unread(environment: Iterable[str]) -> list[str]:
    """Variables that look like flags of the server and are none, as a mistyped one."""
    known = {f"{PREFIX}{name.upper()}" for name in ("model", *(field.name for field in fields(ServeOptions)))}
    return sorted(name for name in environment if name.startswith(PREFIX) and name not in known)
