"""A request on its way through the engine, and who hears of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from polybit.serve.drafting import Guess, Lookup
from polybit.serve.pace import Odds
from polybit.serve.request import Chosen, Done, Piece, Request, Spent
from polybit.serve.sampling import Sampler
from polybit.serve.slots import Slot
from polybit.serve.writing import Writer

Event = Piece | Done


class Carrier(Protocol):
    """What takes events that were told to another thread."""

    @property
    def closed(self) -> bool:
        """Whether nobody waits for them any more."""
        ...

    def send(self) -> None:
        """Called after every tick."""
        ...


@dataclass(eq=False, slots=True)
class Answering:
    """A request on its way. hear: called with every event, from the engine's thread."""

    asked: Request
    hear: Callable[[Event], None]
    sampler: Sampler
    writer: Writer
    spent: Spent
    arrived: float
    slot: Slot | None = None
    read: int = 0  # tokens of prompt and answer whose keys and values are in the place
    gated_to: int = 0  # tokens the gate has read; 0 = what it reads of the prompt
    tokens: list[int] = field(default_factory=list)  # prompt and answer
    drafts: list[int] = field(default_factory=list)  # proposed, to be verified
    guesses: list[list[Guess]] = field(default_factory=list)  # what was thought of for each place, proposed or not
    habit: Odds | None = None  # how often drafts came true
    lookup: Lookup = field(default_factory=lambda: Lookup(0))
    echoed: list[Chosen] = field(default_factory=list)  # tokens of the prompt after the first, where asked for
    cancelled: bool = False
    started: float = 0.0
    answering: float = 0.0
    done: Done | None = None

    @property
    def count(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.asked.tokens)

    @property
    def reading_prompt(self) -> bool:
        """Whether more than the newest token waits to be read."""
        return self.read < len(self.asked.tokens)
