"""`polybit quantize`: a model in, one checkpoint out that runs at every width it was made for."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from polybit.commands.flags import Json, keep
from polybit.core.nursery import warm
from polybit.options.quantize import QuantizeOptions
from polybit.report.quantizing import made


def quantize(model: str, /, *, options: Annotated[QuantizeOptions, Parameter(name="*")], json: Json = None) -> None:
    """Quantize MODEL (a local path, a hub id, a .gguf file, or tinychat) into one checkpoint at --out.

    Interrupted runs go on where they stopped when the same command is given again.
    """
    warm(options, "polybit.acts.quantize")
    from polybit.acts.quantize import quantize as act

    run = act(model, options)
    keep(run, json)
    print(made(str(options.out), model, run.numbers))
