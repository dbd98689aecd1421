"""What `report` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from polybit.options.checks import file_can_be_written


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Which measured numbers make the page, and where it goes."""

    eval: Path | None = None
    """The JSON that `polybit eval --json` wrote (default: what `quantize` measured itself)."""
    before: str | None = None
    """JSON of `polybit eval` of other models on the same text, with commas, as in RTN=rtn.json,KD=kd.json: rows beside
    MODEL, as before and after alignment."""
    judge: Path | None = None
    """JSON of `polybit judge` (its run.json): win, tie, lose, grades, fidelity, conversations side by side."""
    align: Path | None = None
    """JSON of `polybit align --json`: what the training did, and which moment was kept."""
    out: Path = Path("report.html")
    """The page to write."""

    def __post_init__(self) -> None:
        for name in ("eval", "judge", "align", "out"):  # the library takes text as well
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))
        file_can_be_written("--out", self.out)
