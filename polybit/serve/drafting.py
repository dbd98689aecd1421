"""Tokens proposed before they are verified: by the text so far, and by the model's own narrow widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from polybit.hub.rows import TokenRows
from polybit.serve.pace import OWN, PATIENCE, Odds, Pace, StepTimes
from polybit.serve.request import Request, Spent
from polybit.serve.runners import Runner
from polybit.serve.sampling import leader

LONGEST = 4  # tokens of an ending that are looked for, unless more are asked for

Read = Callable[[Sequence[TokenRows], Sequence[int]], list[Tensor]]
Guess = tuple[Odds, int]  # a token that was thought of for a place, and whose odds it tells


class Lookup:
    """What followed the last tokens of a text where they stood before (prompt lookup decoding, A. Saxena 2023).

    least: how many tokens must have occurred together; 0 = never look. The text may only grow.
    """

    def __init__(self, least: int) -> None:
        self.lengths = range(least, max(least, LONGEST) + 1) if least else range(0)
        self.after: dict[tuple[int, ...], int] = {}  # an ending -> the token behind its latest occurrence
        self.known = least  # places before this one are noted

    def __call__(self, text: Sequence[int], drafts: Sequence[int] = ()) -> list[tuple[int, int]]:
        """(length of an ending of text and drafts, the token that followed it where it last stood in the text)."""
        for place in range(self.known, len(text)):
            for length in self.lengths:
                if length <= place:
                    self.after[tuple(text[place - length : place])] = text[place]
        self.known = max(self.known, len(text))
        longest = self.lengths.stop - 1 if self.lengths else 0
        end = [*text[len(text) - longest :], *drafts] if longest < len(text) else [*text, *drafts]
        found = []
        for length in self.lengths:
            token = self.after.get(tuple(end[-length:])) if length <= len(end) else None
            if token is not None:
                found.append((length, token))
        return found


class Drafting(Protocol):
    """What drafting needs of an answer on its way (answering.Answering)."""

    asked: Request
    slot: Any
    read: int
    tokens: list[int]
    drafts: list[int]
    guesses: list[list[Guess]]
    habit: Odds | None
    lookup: Lookup
    spent: Spent

    @property
    def count(self) -> int:
        """Tokens of the answer so far."""
        ...


class Proposals:
    """The proposals of one answer while they grow. most: how many there may be · chance: that all of them come true."""

    def __init__(self, answer: Drafting, pace: Pace, times: StepTimes, most: int) -> None:
        self.answer, self.pace, self.times, self.most, self.chance = answer, pace, times, most, 1.0
        decoding = answer.asked.decoding
        self.pair = (decoding.precision, decoding.draft, answer.asked.sampling.temperature == 0)
        answer.drafts, answer.guesses = [], []
        self.habit = answer.habit = answer.habit or Odds(pace.drafts(self.pair).chance, OWN)
        self.rate, self.row, self.drafts = times.rate, times.row, times.drafts.value
        self.later = [0.0] * (most + 1)  # what the places after one will give, in tokens
        for place in range(most - 1, 0, -1):
            found = self.habit.chance * (1 + self.later[place]) - self.rate * (self.drafts + self.row)
            self.later[place - 1] = max(0.0, found) if decoding.draft else 0.0

    def worth(self, chance: float, seconds: float) -> float:
        """Tokens that a proposal for the next place gives more than its seconds give without any."""
        return self.chance * chance * (1 + self.later[len(self.answer.drafts)]) - self.rate * seconds

    def grow(self) -> bool:
        """Take what the text proposes while that is worth most; whether the draft's width should read on."""
        answer = self.answer
        while len(answer.drafts) < self.most:
            found = [(self.pace.repeat(self.pair, length), token) for length, token in self.looked_up()]
            answer.guesses.append(list(found))
            odds, token = max(found, key=lambda guess: guess[0].chance, default=(None, -1))
            repeat = self.worth(odds.chance, self.row) if odds is not None else 0.0
            drafted = self.worth(self.habit.chance, self.row + self.drafts) if self.pair[1] else 0.0
            if self.pair[1] and (drafted > max(repeat, 0.0) or self.tries(max(repeat, drafted))):
                return True
            if odds is None or repeat <= 0:
                return False
            answer.spent.drafted += 1
            self.add(token, odds.chance)
        return False

    def looked_up(self) -> list[tuple[int, int]]:
        """What the text proposes."""
        return self.answer.lookup(self.answer.tokens, self.answer.drafts)

    def tries(self, worth: float) -> bool:
        """Whether nothing seems to pay and it is time to see again what a draft is worth."""
        if self.answer.drafts or worth > 0:
            return False
        self.times.waited += 1
        return self.times.waited > PATIENCE

    def take(self, token: int, lead: float) -> bool:
        """A draft; whether it is worth verifying. If not, what comes in its place still tells its odds."""
        self.times.waited = 0
        odds = self.pace.draft(self.pair, lead)
        self.answer.guesses[-1] += [(odds, token), (self.pace.drafts(self.pair), token), (self.habit, token)]
        if self.chance * odds.chance <= self.rate * self.row:
            return False
        self.add(token, odds.chance)
        return True

    def add(self, token: int, chance: float) -> None:
        """One more proposal."""
        self.answer.drafts.append(token)
        self.chance *= chance


def draft(runner: Runner, read: Read, answers: Sequence[Drafting], pace: Pace, times: StepTimes) -> None:
    """Let every answer propose as many tokens as pay.

    They are verified by reading them again at the answer's own precision, which also overwrites their keys and values:
    nothing of the draft stays. What stood in the text before costs nothing to propose; where it is not likely enough,
    the draft width reads on (Leviathan et al., arXiv 2211.17192, with the model's own leading planes).
    """
    plain = times.is_flat  # now and then nothing is proposed, to see what a row costs
    going = [Proposals(answer, pace, times, 0 if plain else most_drafts(runner, answer)) for answer in answers]
    while going := [chain for chain in going if chain.grow()]:
        began = pace.clock()
        parts = []
        for chain in going:
            answer = chain.answer
            setting = runner.setting(str(answer.asked.decoding.draft), draft=True)
            newest = answer.drafts[-1:] or answer.tokens[-1:]
            parts.append(TokenRows(setting, answer.slot.index, answer.read + len(answer.drafts), newest))
        proposed = [leader(row) for [row] in read(parts, [1] * len(parts))]
        times.drafts.note((pace.clock() - began) / len(going))
        for chain in going:
            chain.answer.spent.drafted += 1
        going = [chain for chain, guess in zip(going, proposed, strict=True) if chain.take(*guess)]


def learn(answer: Drafting, chosen: Sequence[int]) -> None:
    """Note which guesses the chosen tokens bore out, up to the first place where they left the drafts."""
    for place, (guesses, token) in enumerate(zip(answer.guesses, chosen, strict=False)):
        for odds, guess in guesses:
            odds.note(guess == token)
        if place < len(answer.drafts) and answer.drafts[place] != token:
            break
    answer.guesses = []


def most_drafts(runner: Runner, answer: Drafting) -> int:
    """How many drafts an answer has use and room for."""
    left = answer.asked.max_tokens - answer.count - 1
    return max(0, min(answer.asked.decoding.drafts, left, runner.room - len(answer.tokens) - 1))
