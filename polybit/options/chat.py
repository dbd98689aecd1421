"""What `chat` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polybit.core.runtime import PolybitError
from polybit.options.checks import at_least


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How to talk."""

    precision: str | None = None
    """Width to begin at, as in w3 or w4a8 (default: the widest stored; a float model runs in float)."""
    system: str | None = None
    """What the model is told before the first turn."""
    line: list[str] | None = None
    """What to say, in order, instead of what is typed or piped in; commands such as
    "/width w3" too. May be repeated."""
    arithmetic: Literal["auto", "float", "int16", "int8"] = "auto"
    """How inputs are rounded before a product, as for polybit generate."""
    max_tokens: int = 512
    """Most new tokens of an answer."""
    temperature: float = 0.0
    """0 = greedy; higher draws more freely."""
    seed: int = 0
    """Seed of the draw when the temperature is above 0."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""

    def __post_init__(self) -> None:
        at_least(self, max_tokens=1)
        if not 0 <= self.temperature < float("inf"):
            raise PolybitError(
                f"--temperature {self.temperature} is not possible: give 0 (greedy) or a positive number"
            )
