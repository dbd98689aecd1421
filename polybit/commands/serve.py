"""`polybit serve`: answer requests over HTTP, each at its own precision."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from polybit.options.serve import ServeOptions


def serve(model: str, /, *, options: Annotated[ServeOptions, Parameter(name="*")] = ServeOptions()) -> None:
    """Serve MODEL (a polybit directory, any Hugging Face id or path, or tinychat) over HTTP until Ctrl-C.

    Speaks OpenAI's chat, completions and responses and Anthropic's messages. The width is chosen by the model's name
    (NAME@w4, NAME@auto) or by the field "precision". A page to chat with stands at /.
    """
    from polybit.acts.serve import serve as act

    act(model, options)
