"""`polybit cost`: what every precision of a checkpoint costs - BitOPs, bytes read, measured time - side by side."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from polybit.commands.flags import Json, keep
from polybit.options.cost import CostOptions
from polybit.report.speed import costs


def cost(
    target: str, /, *, options: Annotated[CostOptions, Parameter(name="*")] = CostOptions(), json: Json = None
) -> None:
    """Say what a token of TARGET (a polybit directory) costs at each precision, in three units that are no synonyms."""
    from polybit.acts.cost import cost as act

    run = act(target, options)
    print(costs(run.numbers))
    if options.steps:
        machine = run.to_json()["machine"]
        print(f"measured on {machine['processor']}, {machine['threads']} thread(s)")
    keep(run, json)
    if json is not None:
        print(f"All numbers: {json}")
