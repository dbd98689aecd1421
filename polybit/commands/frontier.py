"""`polybit frontier`: which precision each layer should have, for every cost – measured, not only added up."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from polybit.commands.flags import Json, keep
from polybit.options.frontier import FrontierOptions


def frontier(
    checkpoint: str, /, *, options: Annotated[FrontierOptions, Parameter(name="*")], json: Json = None
) -> None:
    """Search the best precision per layer of CHECKPOINT at every cost, measure it, and draw the frontier.

    Harm is the KL to the float model in nats per token. Layers are measured one at a time for the exact and the greedy
    frontier; whole choices are then measured, crossed and changed, because harms of layers do not simply add up.
    """
    from polybit.acts.frontier import frontier as act

    run = act(checkpoint, options)
    keep(run, json)
    best = [point for point in run.numbers["points"] if point["best"]]
    print((options.out / "frontier.md").read_text(encoding="utf-8"))
    print(f"{len(run.numbers['points'])} models measured, {len(best)} of them on the frontier: {options.out}")
