"""What `cost` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from polybit.options.checks import at_least


@dataclass(frozen=True, kw_only=True)
class CostOptions:
    """Which precisions to cost, and how a token is timed."""

    precision: str | None = None
    """Precisions with commas, as in w8,w4,w4a8k4v4 (default: every stored width)."""
    context: int = 256
    """Tokens already read when the token that is counted comes."""
    steps: int = 24
    """Tokens timed per precision and round; 0 = measure no time."""
    rounds: int = 3
    """Rounds in which all precisions take turns, so that a drifting machine is fair to all."""

    def __post_init__(self) -> None:
        at_least(self, context=1, steps=0, rounds=1)
