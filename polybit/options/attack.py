"""What `attack` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polybit.core.parts import described, pick
from polybit.data.table import EMBEDDED
from polybit.options.checks import Device, at_least, file_can_be_written, seeds_of, squad_is_there
from polybit.robust.table import ATTACKS, PLACES, AttackBudget

if TYPE_CHECKING:
    Method = str
    Place = Literal["suffix", "swap"]
else:
    Method = Literal[tuple(ATTACKS)]
    Place = Literal[tuple(PLACES)]
BUDGET = AttackBudget()


@dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """How to attack a checkpoint, and at which widths."""

    squad: str = EMBEDDED
    """Questions of a SQuAD or KorQuAD file, or 'embedded' for the reading task of the embedded model."""
    items: int = 48
    """Questions to attack, for each seed others."""
    precision: str | None = None
    """Widths to attack and to answer at, with commas (default: the stored ones, at most five)."""
    method: Method = field(default="greedy", metadata={"help": f"How to attack: {described(ATTACKS)}."})
    place: Place = field(
        default="suffix",
        metadata={"help": f"Of attacks on tokens: {'; '.join(f'{name} = {what}' for name, what in PLACES.items())}."},
    )
    tokens: int = 6
    """Tokens (or edited words) the attacker has."""
    steps: int = BUDGET.steps
    """Steps of the search."""
    tries: int = BUDGET.tries
    """Changes measured per step."""
    epsilon: float = BUDGET.epsilon
    """Of attacks on embeddings: how far one may move, as a share of their mean length."""
    seeds: str = "0"
    """Seeds, with commas: each asks other questions and begins elsewhere."""
    max_tokens: int = 24
    """Longest answer."""
    json: Path | None = None
    """Write all numbers there; an interrupted run with the same file goes on."""
    restart: bool = False
    """Forget what an interrupted run with the same --json left."""
    device: Device = "auto"
    """Where models run (auto: a GPU where there is one)."""

    def __post_init__(self) -> None:
        file_can_be_written("--json", self.json)
        pick(ATTACKS, self.method, "--method")
        pick(PLACES, self.place, "--place")
        at_least(self, items=1, tokens=1, max_tokens=1)
        squad_is_there("--squad", self.squad)
        seeds_of(self.seeds)
        at_least(self, steps=1, tries=1)
        self.budget()

    def budget(self) -> AttackBudget:
        """What the attacker may spend."""
        return AttackBudget(steps=self.steps, tries=self.tries, changes=self.tokens, epsilon=self.epsilon)
