"""What `generate` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polybit.core.runtime import PolybitError
from polybit.options.checks import Device, at_least


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How to answer one prompt."""

    prompt: str
    """What to answer."""
    precision: str | None = None
    """Width to run at, as in w3 or w4a8 (default: the widest stored; a float model runs in float)."""
    arithmetic: Literal["auto", "float", "int16", "int8"] = "auto"
    """How inputs are rounded before a product: float = not at all, exact and many times slower; int16 = error below
    1e-4; int8 = fastest (auto: int8 for weights of 4 bits or fewer, whose own error hides it, int16 for wider ones)."""
    max_tokens: int = 64
    """Most new tokens to write."""
    temperature: float = 0.0
    """0 = greedy; higher draws more freely."""
    seed: int = 0
    """Seed of the draw when the temperature is above 0."""
    raw: bool = False
    """Continue the prompt as it stands instead of wrapping it in the model's chat template."""
    device: Device = "auto"
    """Where the model runs (auto: a GPU where there is one)."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""

    def __post_init__(self) -> None:
        at_least(self, max_tokens=1)
        if not 0 <= self.temperature < float("inf"):
            raise PolybitError(
                f"--temperature {self.temperature} is not possible: give 0 (greedy) or a positive number"
            )
        if not self.prompt.strip():
            raise PolybitError("--prompt is empty: give some text to answer")
