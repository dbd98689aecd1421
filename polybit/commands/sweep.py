"""`polybit sweep`: the same model quantized and measured under every combination of some flags, with several seeds."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from polybit.options.sweep import SweepOptions
from polybit.report.sweep import sweep_table


def sweep(model: str, /, *, options: Annotated[SweepOptions, Parameter(name="*", consume_multiple=True)]) -> None:
    """Quantize and measure MODEL under every combination of flags; a table with intervals over seeds, paired.

    An interrupted sweep goes on where it stopped when the same command is given again.
    """
    from polybit.acts.sweep import sweep as act

    run = act(model, options)
    print(sweep_table(run.numbers))
    print(f"\nAll numbers: {options.out / 'sweep.json'}; table: {options.out / 'table.md'}")
