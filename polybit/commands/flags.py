"""What the verbs share on the command line: the flag that keeps a run as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

if TYPE_CHECKING:  # `polybit VERB --help` loads no torch
    from polybit.core.records import Run

Json = Annotated[Path | None, Parameter(help="Write the run with all its numbers there.")]


def keep(run: Run, path: Path | None) -> None:
    """Write the run where --json says, if it was given."""
    if path is not None:
        run.write(path)
