"""`polybit train`: one model made good at several precisions, saved as one checkpoint with its presets."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from polybit.commands.flags import Json, keep
from polybit.options.train import TrainOptions
from polybit.report.training import training_table


def train(model: str, /, *, options: Annotated[TrainOptions, Parameter(name="*")], json: Json = None) -> None:
    """Train MODEL (a float model or a polybit checkpoint) at all --presets, so that one file is good at each.

    Best from a checkpoint of `polybit quantize`: training then starts at its quality. The moment of the run with the
    least held-out loss at which no preset is worse than it was at the start is kept, the start if there is none.
    """
    from polybit.acts.train import train as act

    run = act(model, options)
    keep(run, json)
    numbers = run.numbers
    print(training_table(numbers))
    print(f"\nKept: {numbers['kept']}.")
    print("Saved: " + ", ".join(numbers["saved"]))
    first = next(iter(numbers["presets"]))
    print(f'Next: polybit generate {numbers["saved"][0]} --prompt "Hello" --precision {first}')
