"""What `plan` can be told: what it shares with `quantize`, and how far to look ahead."""

from __future__ import annotations

from dataclasses import dataclass

from polybit.options.quantize import CodeOptions


@dataclass(frozen=True, kw_only=True)
class PlanOptions(CodeOptions):
    """How to say what quantizing would give and cost; what it shares with quantize means the same."""

    threads: int | None = None
    """Threads the speed is predicted for (default: those torch takes)."""
    dry_run: bool = True
    """Quantize one block of random weights of the model's shape here, to tell the time the whole will take."""
