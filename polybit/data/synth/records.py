"""What the generators return: conversations with the truth about every answer, and single questions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, str]


@dataclass(frozen=True)
class Turn:
    """One exchange. `scored` is False where several replies would have been right and one was drawn."""

    user: str
    assistant: str
    truth: dict[str, Any] = field(default_factory=dict)
    scored: bool = True


@dataclass(frozen=True)
class Document:
    """A conversation; `task` is reading, arithmetic, drill or dialogue."""

    task: str
    turns: tuple[Turn, ...]

    @property
    def messages(self) -> list[Message]:
        """The whole conversation as chat messages."""
        return exchange(self.turns)


@dataclass(frozen=True)
class Item:
    """One question of an evaluation: the prompt so far, ending with the user, and the only right reply."""

    id: str
    task: str
    messages: tuple[Message, ...]
    answer: str
    extras: dict[str, Any] = field(default_factory=dict)


def exchange(turns: tuple[Turn, ...]) -> list[Message]:
    """Turns as alternating user and assistant messages."""
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in (("user", turn.user), ("assistant", turn.assistant))
    ]
