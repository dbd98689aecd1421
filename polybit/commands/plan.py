"""`polybit plan`: sizes, memory, time and what stays in float, before anything is run."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from polybit.commands.flags import Json, keep
from polybit.options.plan import PlanOptions
from polybit.report.quantizing import foretold


def plan(
    model: str, /, *, options: Annotated[PlanOptions, Parameter(name="*")] = PlanOptions(), json: Json = None
) -> None:
    """Say what quantizing MODEL would give and cost. Reads its configuration only, no weights."""
    from polybit.acts.plan import plan as act

    run = act(model, options)
    print(foretold(model, run.numbers))
    keep(run, json)
