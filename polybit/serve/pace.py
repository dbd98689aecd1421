"""How far it pays to draft: what proposals were worth so far, and what steps took.

A proposal is worth its chance to be the next token; it costs a row more to verify and, unless it stood in the text
before, a step of the draft's width. It pays while   chance / seconds   is above the tokens per second that steps
without proposals give. Everything is measured while serving, so that drafting ends by itself where rows are dear, as in
a crowd on a CPU. Nothing here can change a token.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterable
from time import perf_counter

KEPT = 64  # observations after which older ones count half, and kinds of steps that are remembered
TRUST = 4.0  # observations that a first guess counts for
OWN = 8.0  # observations that what others saw counts for in one answer
LEADS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # nats between which a draft's odds are kept
SURE = (0.5, 0.55, 0.6, 0.7, 0.85, 0.95, 0.98)  # first guesses: a draft's chance by its lead
DRAFTS = 0.8  # of a draft whose lead is not known yet
REPEATS = (0.2, 0.45, 0.65, 0.8)  # of what followed where the last 1, 2, 3, 4 tokens stood before
ROW = 0.1  # of a step's seconds per row: what a row more costs before rows were seen to differ,
HELD = 0.01  # which weighs as much as so large a variance of rows
FLAT = 0.1  # variance of rows below which a step without proposals is asked for
SLOW = 4.0  # times the mean: what takes longer was disturbed, and counts as that
PATIENCE = 32  # steps after which a draft is tried although it did not seem to pay


class Odds:
    """How often something came true; what is long ago counts less."""

    __slots__ = ("seen", "true")

    def __init__(self, chance: float, weight: float = TRUST) -> None:
        self.true, self.seen = chance * weight, weight

    @property
    def chance(self) -> float:
        """Its share."""
        return self.true / self.seen

    def note(self, came_true: bool) -> None:
        """Once more."""
        if self.seen >= KEPT:
            self.true, self.seen = self.true / 2, self.seen / 2
        self.true += came_true
        self.seen += 1


class StepTimes:
    """Seconds of steps of one kind, recent ones counting more: a line over their rows.

    drafts: seconds of a step of the draft's width, per answer in it · waited: steps since a draft was last tried.
    """

    def __init__(self) -> None:
        self.steps = self.answers = self.rows = self.seconds = self.squares = self.products = 0.0
        self.drafts = Mean()
        self.waited = 0

    def note(self, answers: int, rows: int, seconds: float) -> None:
        """A step: the answers in it, their rows, its seconds."""
        if self.steps > TRUST:
            seconds = min(seconds, SLOW * self.seconds / self.steps)
        kept = 1 - 1 / KEPT
        self.steps = self.steps * kept + 1
        self.answers = self.answers * kept + answers
        self.rows = self.rows * kept + rows
        self.seconds = self.seconds * kept + seconds
        self.squares = self.squares * kept + rows * rows
        self.products = self.products * kept + rows * seconds

    @property
    def spread(self) -> float:
        """Variance of the rows."""
        return max(0.0, self.squares / self.steps - (self.rows / self.steps) ** 2) if self.steps else 0.0

    @property
    def is_flat(self) -> bool:
        """Whether rows differed so little that what one of them costs cannot be seen."""
        return bool(self.steps) and self.spread < FLAT and self.rows > self.answers

    @property
    def row(self) -> float:
        """Seconds that a row more costs: the slope of the line, held to a guess where rows hardly differed."""
        if not self.rows:
            return 0.0
        mean, seconds = self.rows / self.steps, self.seconds / self.steps
        together = self.products / self.steps - mean * seconds
        return max(0.0, (together + HELD * ROW * seconds / mean) / (self.spread + HELD))

    @property
    def rate(self) -> float:
        """Tokens per second without proposals, where the line is at a row per answer; 0 before anything was seen."""
        if not self.rows:
            return 0.0
        alone = self.seconds - self.row * (self.rows - self.answers)
        return self.answers / max(alone, ROW * self.seconds) if self.seconds else 0.0


class Mean:
    """A mean in which older numbers count less."""

    __slots__ = ("count", "sum")

    def __init__(self) -> None:
        self.sum = self.count = 0.0

    @property
    def value(self) -> float:
        """0 before the first number."""
        return self.sum / self.count if self.count else 0.0

    def note(self, number: float) -> None:
        """One more."""
        if self.count > TRUST:
            number = min(number, SLOW * self.value)
        kept = 1 - 1 / KEPT
        self.sum, self.count = self.sum * kept + number, self.count * kept + 1


class Pace:
    """What one engine has seen of proposals and steps. clock: seconds."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self.clock = clock
        self.known: dict[tuple[object, ...], Odds] = {}  # as many as there are pairs of widths
        self.kinds: dict[tuple[object, ...], StepTimes] = {}

    def times(self, settings: Iterable[int]) -> StepTimes:
        """Of steps that read answers at these settings, about so many."""
        found = list(settings)
        kind = (*sorted(set(found)), "answers", len(found).bit_length())
        if kind not in self.kinds and len(self.kinds) >= KEPT:
            self.kinds.clear()
        return self.kinds.setdefault(kind, StepTimes())

    def odds(self, start: float, *key: object) -> Odds:
        """The odds of something; `start` before it was seen."""
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = Odds(start)
        return found

    def repeat(self, pair: tuple[object, ...], length: int) -> Odds:
        """Of what followed where the last `length` tokens stood before."""
        length = min(length, len(REPEATS))
        return self.odds(REPEATS[length - 1], *pair, "repeat", length)

    def draft(self, pair: tuple[object, ...], lead: float) -> Odds:
        """Of a draft that led the second likeliest token by so many nats."""
        place = bisect(LEADS, lead)
        return self.odds(SURE[place], *pair, "lead", place)

    def drafts(self, pair: tuple[object, ...]) -> Odds:
        """Of a draft before it is read."""
        return self.odds(DRAFTS, *pair, "draft")
