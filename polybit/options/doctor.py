"""What `doctor` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Where to look."""

    where: Path = Path()
    """Directory that checkpoints are to be written to; its free space is looked at."""
