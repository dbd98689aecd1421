"""What `frontier` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from polybit.core.precision import FLOAT, Precision
from polybit.core.runtime import PolybitError
from polybit.options.checks import at_least, folder_can_be_written


@dataclass(frozen=True, kw_only=True)
class FrontierOptions:
    """How to search and measure the best precision of every layer at every cost."""

    out: Path
    """Directory for frontier.svg, frontier.md, points.json and a plan per point of the frontier."""
    presets: str = "w8,w6,w4,w3"
    """Precisions a layer may have, with commas, as in w8a8,w4a8,w4a4."""
    cost: Literal["bytes", "bitops"] = "bytes"
    """What is to be saved: bytes read per token, or bit operations (a count, not a time)."""
    text: str | None = None
    """Text to measure on (default: as polybit eval)."""
    windows: int = 16
    """Windows of text."""
    window: int = 128
    """Tokens per window."""
    points: int = 10
    """Budgets of the exact frontier."""
    evaluations: int = 60
    """Whole models the evolutionary search may measure; 0 = none."""
    reference: str | None = None
    """The float model (default: the one the checkpoint says it was made from)."""
    seed: int = 0
    """Seed of the search."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""

    def __post_init__(self) -> None:
        if self.points < 2 or self.windows < 1 or self.evaluations < 0:
            raise PolybitError("--points needs 2 or more, --windows 1 or more and --evaluations 0 or more")
        preset_names(self.presets)
        at_least(self, window=2)
        folder_can_be_written("--out", self.out)


def preset_names(text: str) -> list[str]:
    """The precisions asked for, each once, refused when unreadable or without weight bits."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if len(found) < 2:
        raise PolybitError(f"--presets {text!r:.60} leaves nothing to choose: give two precisions or more")
    for name in found:
        if Precision.parse(name).w == FLOAT:
            raise PolybitError(f"--presets names {name!r}, which quantizes no weight: give widths such as w8 or w4a8")
    return found
