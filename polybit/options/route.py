"""What `route` can be told."""

from __future__ import annotations

from dataclasses import dataclass

from polybit.core.runtime import PolybitError
from polybit.options.checks import Device, at_least


@dataclass(frozen=True, kw_only=True)
class RouteOptions:
    """From which prompts a router learns, and what it may spend."""

    prompts: str
    """Prompts as users send them: a .txt (one per line), .jsonl, .csv or .tsv file, a named set or a dataset id."""
    budget: float = 4.5
    """Mean bits per weight over the prompts."""
    precision: str | None = None
    """Widths to choose from, with commas (default: every stored width)."""
    reference: str | None = None
    """The float model (default: the one the checkpoint says it was made from)."""
    limit: int = 400
    """At most so many prompts."""
    max_tokens: int = 48
    """Tokens of each answer on which widths are compared."""
    states: int = 16
    """Directions of the first blocks' states that the router looks at; 0 = it reads no block."""
    gate_prompts: int = 120
    """Prompts from which margins of gates are learnt (precision gate of a request); 0 = none."""
    seed: int = 0
    """Seed of intervals."""
    dry_run: bool = False
    """Measure and report, but leave the checkpoint as it is."""
    device: Device = "auto"
    """Where models run (auto: a GPU where there is one)."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""

    def __post_init__(self) -> None:
        at_least(self, limit=20, max_tokens=1, states=0, gate_prompts=0)
        if not 1 <= self.budget <= 8:
            raise PolybitError(f"--budget {self.budget} is not possible: give mean bits per weight, from 1 to 8")
