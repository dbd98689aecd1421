"""`polybit columns`: widths inside layers, for a plan that spends each layer's bits on the columns that need them."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from polybit.commands.flags import Json, keep
from polybit.options.columns import ColumnsOptions


def columns(model: str, /, *, options: Annotated[ColumnsOptions, Parameter(name="*")], json: Json = None) -> None:
    """Search widths for blocks of columns inside the layers of MODEL and write them as a plan.

    `polybit quantize MODEL --plan PLAN` makes the checkpoint.
    """
    from polybit.acts.columns import columns as act

    run = act(model, options)
    keep(run, json)
    moved = sum(any(row["offsets"]) for row in run.numbers["layers"].values())
    without, searched = run.numbers["without"], run.numbers["with"]
    print(f"{moved} of {len(run.numbers['layers'])} layers have blocks of {options.block} columns worth other widths.")
    print(
        f"KL on held-out windows: {searched['kl']:.4f} with them at {searched['bits_per_weight']:.3f} bits per weight, "
        f"{without['kl']:.4f} without at {without['bits_per_weight']:.3f}."
    )
    if not run.numbers["kept"]:
        print(f"They do not pay: {options.out} is the plan without widths inside layers.")
    of = options.sort or model
    print(f"Next: polybit quantize {of} --plan {options.out} --group-size {options.group_size} --out OUT")
