"""`polybit report`: one self-contained HTML page from measured numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from polybit.commands.flags import can_be_written
from polybit.core.runtime import write_json
from polybit.options.report import ReportOptions

Shown = Annotated[
    Path | None, Parameter(help="Write what the page shows there too.", validator=can_be_written("--json"))
]


def report(
    model: Path, /, *, options: Annotated[ReportOptions, Parameter(name="*")] = ReportOptions(), json: Shown = None
) -> None:
    """Write the page of the checkpoint MODEL: quality against bits, flips, margins, bytes per layer, sample answers.

    With --before, --judge or --align also what alignment changed: margins, flips, judged answers, side by side.
    """
    from polybit.acts.report import report as act

    run = act(str(model), options)
    if json is not None:
        write_json(json, run.numbers)
    print(f"{options.out}: {options.out.stat().st_size / 1000:.0f} kB, one file, no links outwards")
