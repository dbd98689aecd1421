"""What the verbs share on the command line: the flag that keeps a run as JSON."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from polybit.core.runtime import PolybitError, nearest

if TYPE_CHECKING:  # `polybit VERB --help` loads no torch
    from polybit.core.records import Run


def can_be_written(_: Any, path: Path | None) -> None:
    """Refuse a file that cannot be written before the work is done whose numbers it is to keep."""
    if path is None:
        return
    if nearest(path) == path.absolute() and path.is_dir():
        raise PolybitError(f"--json {path} is a directory: give the name of a file")
    folder = nearest(path.parent)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise PolybitError(f"--json {path} cannot be written, {folder} is read-only or no directory: choose another")


Json = Annotated[Path | None, Parameter(help="Write the run with all its numbers there.", validator=can_be_written)]


def keep(run: Run, path: Path | None) -> None:
    """Write the run where --json says, if it was given."""
    if path is not None:
        run.write(path)
