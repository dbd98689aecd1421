"""`polybit attack`: attack a checkpoint at every width, answer at every other, and judge random precision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from polybit.commands.flags import can_be_written
from polybit.core.runtime import atomic_path
from polybit.options.attack import AttackOptions
from polybit.report.robustness import page, terminal_table

Page = Annotated[
    Path | None, Parameter(help="Write a page with the heat map there.", validator=can_be_written("--report"))
]


def attack(
    target: str, /, *, options: Annotated[AttackOptions, Parameter(name="*")] = AttackOptions(), report: Page = None
) -> None:
    """Attack TARGET (a polybit directory) at each width, answer at every width, and judge a width drawn per prompt."""
    from polybit.acts.attack import attack as act

    run = act(target, options)
    print(terminal_table(run.numbers))
    print("\n" + run.numbers["verdict"])
    if options.json is not None:
        print(f"All numbers: {options.json}")
    if report is not None:
        with atomic_path(report) as staged:
            staged.write_text(page(run.to_json()), encoding="utf-8")
        print(f"Page: {report}")
