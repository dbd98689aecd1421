"""What the verbs share on the command line: the flag that keeps a run as JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from polybit.options.checks import file_can_be_written

if TYPE_CHECKING:  # `polybit VERB --help` loads no torch
    from polybit.core.records import Run


def can_be_written(flag: str) -> Callable[[Any, Path | None], None]:
    """Refuses a file that cannot be written before the work is done that it is to keep."""
    return lambda _, path: file_can_be_written(flag, path)


Json = Annotated[
    Path | None, Parameter(help="Write the run with all its numbers there.", validator=can_be_written("--json"))
]


def keep(run: Run, path: Path | None) -> None:
    """Write the run where --json says, if it was given."""
    if path is not None:
        run.write(path)
