"""Which width an `auto` request gets: what its prompt needs, lowered while many wait, within the operator's bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from polybit.core.precision import Precision

Needs = Callable[[Sequence[int]], str]  # prompt tokens -> the precision a router asks for


@dataclass(frozen=True, slots=True)
class AutoChoice:
    """A width that was chosen, and what decided it: the default, the router, or the load."""

    precision: str
    by: str


@dataclass(frozen=True, slots=True)
class AutoPolicy:
    """widths: those an auto request may get, widest first · start, full: pressure (requests per place) from which
    widths are lowered, and at which the narrowest is left · needs: a fitted router; None = the widest.

    As pressure grows from `start` to `full` the most an answer may get falls evenly over the widths; when it falls, new
    answers get more again. A running answer keeps what it began with.
    """

    widths: tuple[str, ...]
    start: float = 0.75
    full: float = 2.0
    needs: Needs | None = None

    def choose(self, tokens: Sequence[int], pressure: float) -> AutoChoice:
        """The width of one request, and why."""
        wanted = self.widths[0] if self.needs is None else self.nearest(self.needs(tokens))
        place = self.widths.index(wanted)
        share = min(1.0, max(0.0, (pressure - self.start) / max(self.full - self.start, 1e-9)))
        least = round(share * (len(self.widths) - 1))
        if least > place:
            return AutoChoice(self.widths[least], "load")
        return AutoChoice(wanted, "default" if self.needs is None else "router")

    def nearest(self, precision: str) -> str:
        """The narrowest allowed width that is no narrower than what is wanted, else the widest."""
        bits = Precision.parse(precision).w
        able = [width for width in self.widths if Precision.parse(width).w >= bits]
        return able[-1] if able else self.widths[0]
