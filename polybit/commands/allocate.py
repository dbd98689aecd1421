"""`polybit allocate`: how many bits each layer deserves under a budget, and whether that beats spending them evenly."""

from __future__ import annotations

import sys
from typing import Annotated

from cyclopts import Parameter

from polybit.commands.flags import Json, keep
from polybit.core.nursery import warm
from polybit.data.table import EMBEDDED_TASKS, HUB_SETS, HUB_TASKS
from polybit.options.allocate import AllocateOptions
from polybit.report.allocation import told, warned
from polybit.report.mixture import as_flag, chosen


def allocate(
    model: str,
    /,
    *,
    options: Annotated[AllocateOptions, Parameter(name="*", consume_multiple=True)],
    json: Json = None,
) -> None:
    """Spend --bits per weight on the layers of MODEL where the tasks and the general text need them.

    Writes a plan for polybit quantize --plan. Sensitivities are measured once and kept for every later budget;
    interrupted runs go on where they stopped.
    """
    warm(options, "polybit.acts.allocate")
    from polybit.acts.allocate import allocate as act

    run = act(model, options)
    keep(run, json)
    print(f"{options.out}: {told(run.numbers)}")
    if warning := warned(run.numbers):
        print(f"polybit: warning: {warning}", file=sys.stderr)
    zero = " --asymmetric" if options.asymmetric else ""
    mixture = run.numbers.get("mixture")
    if mixture is not None:
        print(chosen(mixture))
        named = [source for source, share in mixture["best"]["weights"].items() if share > 0]
        readable = not ({*EMBEDDED_TASKS, *HUB_TASKS} - {*HUB_SETS}) & {*named}  # as text, by quantize
        zero += f" --mix {as_flag(mixture)}" if readable else ""
    print(f"Next: polybit quantize {model} --out OUT --plan {options.out} --group-size {options.group_size}{zero}")
    if options.report is not None:
        print(f"Page: {options.report}")
