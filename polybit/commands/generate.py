"""`polybit generate`: answer a prompt at a chosen width."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated

from cyclopts import Parameter

from polybit.commands.flags import Json, keep
from polybit.options.generate import GenerateOptions


def generate(model: str, /, *, options: Annotated[GenerateOptions, Parameter(name="*")], json: Json = None) -> None:
    """Answer a prompt with MODEL (a polybit directory, any Hugging Face id or path, or tinychat)."""
    from polybit.acts.generate import generate as act

    if sys.stdout.isatty():
        run = act(model, options, say=partial(print, end="", flush=True))
        print()
    else:
        run = act(model, options)
        print(run.numbers["answer"])
    keep(run, json)
