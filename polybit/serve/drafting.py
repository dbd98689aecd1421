"""Tokens proposed before they are verified: by the text so far, and by the model's own narrow widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from polybit.hub.rows import TokenRows
from polybit.serve.request import Request, Spent
from polybit.serve.runners import Runner
from polybit.serve.sampling import lead_of, likeliest

LONGEST_LOOKUP = 3  # with the newest token they fill one tile of the kernels, whose inputs of 16 bits are two rows each

Read = Callable[[Sequence[TokenRows], Sequence[int]], list[Tensor]]


class Lookup:
    """What followed the last tokens of a text where they stood before (prompt lookup decoding, A. Saxena 2023).

    ending: how many tokens must have occurred together. The text may only grow.
    """

    def __init__(self, ending: int) -> None:
        self.ending = ending
        self.after: dict[tuple[int, ...], int] = {}  # an ending -> the place behind its latest occurrence
        self.known = ending  # places before this one are noted

    def __call__(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may come next; where the text repeats itself they go on repeating it."""
        while self.known < len(tokens):
            self.after[tuple(tokens[self.known - self.ending : self.known])] = self.known
            self.known += 1
        at = self.after.get(tuple(tokens[-self.ending :])) if self.ending else None
        if at is None:
            return []
        found: list[int] = []
        for place in range(at, at + most):
            found.append(tokens[place] if place < len(tokens) else found[place - len(tokens)])
        return found


class Drafting(Protocol):
    """What drafting needs of an answer on its way (engine.Answering)."""

    asked: Request
    slot: Any
    read: int
    tokens: list[int]
    drafts: list[int]
    lookup: Lookup
    spent: Spent

    @property
    def count(self) -> int:
        """Tokens of the answer so far."""
        ...


def draft(runner: Runner, read: Read, answers: Sequence[Drafting]) -> None:
    """Let every answer that asks for it propose tokens.

    They are verified by reading them again at the answer's own precision, which also overwrites their keys and values:
    nothing of the draft stays. What stood in the text before costs nothing to propose; where nothing did, the draft
    width reads on (Leviathan et al., arXiv 2211.17192, with the model's own leading planes) until it is unsure.
    """
    going = []
    for answer in answers:
        decoding = answer.asked.decoding
        most = min(LONGEST_LOOKUP, most_drafts(runner, answer, LONGEST_LOOKUP))
        answer.drafts = answer.lookup(answer.tokens, most) if decoding.lookup else []
        if decoding.draft is not None and not answer.drafts:
            going.append(answer)
    while going:
        going = [
            answer for answer in going if len(answer.drafts) < most_drafts(runner, answer, answer.asked.decoding.drafts)
        ]
        parts = []
        for answer in going:
            setting = runner.setting(str(answer.asked.decoding.draft), draft=True)
            newest = answer.drafts[-1:] or answer.tokens[-1:]
            parts.append(TokenRows(setting, answer.slot.index, answer.read + len(answer.drafts), newest))
        unsure = []
        for answer, logits_1V in zip(going, read(parts, [1] * len(parts)), strict=True):
            answer.drafts.append(likeliest(logits_1V[0]))
            if lead_of(logits_1V[0]) < answer.asked.decoding.sure:
                unsure.append(id(answer))
        going = [answer for answer in going if id(answer) not in unsure]
    for answer in answers:
        answer.spent.drafted += len(answer.drafts)


def most_drafts(runner: Runner, answer: Drafting, wanted: int) -> int:
    """How many of the wanted drafts an answer has use and room for."""
    left = answer.asked.max_tokens - answer.count - 1
    return max(0, min(wanted, left, runner.room - len(answer.tokens) - 1))
