"""Widths inside a layer: which blocks of columns get one bit more and which one less, at the layer's mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import floor, gcd, inf

from torch import Tensor

from polybit.core.runtime import PolybitError

TRIES = 16  # most values of i that a search quantizes the layer for


@dataclass(frozen=True, slots=True)
class Split:
    """Offsets of the blocks of one layer, the harm measured with them, and what was tried: (name, harm)."""

    offsets: tuple[int, ...]
    harm: float
    tried: tuple[tuple[str, float], ...] = ()


def block_lengths(columns: int, block: int) -> tuple[int, ...]:
    """Columns of each block; the last one may be shorter."""
    return tuple(min(block, columns - start) for start in range(0, columns, block))


def base_width(mean: float) -> int:
    """The layer width offsets are counted from: 3 for a mean of 3.5."""
    return floor(mean + 1e-9)


def ranked_offsets(
    salience: Sequence[float], lengths: Sequence[int], mean: float, raised: int
) -> tuple[int, ...] | None:
    """Offsets to floor(mean) by rank: as many most salient blocks one bit up as the fraction of the mean pays for,
    then `raised` more up and as many least salient ones down; None where there are not that many blocks.

    Slim-LLM's salience-determined bit allocation (arXiv 2405.14917 §3.2): equal counts keep the mean. A short last
    block takes no part in the exchange, so that the mean never rises.
    """
    full = [k for k, length in enumerate(lengths) if length == lengths[0]]
    order = sorted(full, key=lambda k: -float(salience[k]))
    spare = floor((mean - base_width(mean)) * sum(lengths) / lengths[0] + 1e-9)
    up = min(spare, len(order)) + raised
    if up + raised > len(order):
        return None
    offsets = [0] * len(lengths)
    for k in order[:up]:
        offsets[k] = 1
    for k in order[len(order) - raised :]:
        offsets[k] = -1
    return tuple(offsets)


def search_ranked(
    salience: Sequence[float] | Tensor,
    lengths: Sequence[int],
    mean: float,
    harm: Callable[[tuple[int, ...]], float],
    *,
    tries: int = TRIES,
) -> Split:
    """Try i = 0, 1, ... exchanged blocks, ranked by salience, and keep the offsets that do least harm.

    harm(offsets): what quantizing the layer with them does to its output. The search of SliM-LLM, over all i or, where
    there are more than `tries`, over as many evenly spaced ones. Unlike the paper, i = 0 is among them, so that equal
    widths are kept where no exchange helps.
    """
    ranked = [float(value) for value in salience]
    most = 0
    while ranked_offsets(ranked, lengths, mean, most + 1) is not None:
        most += 1
    every = max(1, -(-most // max(tries - 1, 1)))
    found = []
    for raised in dict.fromkeys([*range(0, most + 1, every), most]):
        offsets = ranked_offsets(ranked, lengths, mean, raised)
        if offsets is not None:
            found.append((harm(offsets), raised, offsets))
    least, _, best = min(found)
    return Split(best, least, tuple((f"i={raised}", value) for value, raised, _ in found))


def spend(
    harms: Sequence[Sequence[float]], widths: Sequence[int], lengths: Sequence[int], mean: float
) -> tuple[int, ...]:
    """Width of every block with the least sum of harms whose mean over columns is at most `mean`; exact.

    harms: one row per block, one value per width, measured in one unit · widths: ascending. Dynamic programme over
    the budget in units of the block lengths' common divisor. Raises PolybitError for a mean below the least width.
    """
    unit = reduce(gcd, lengths)
    budget = floor(mean * sum(lengths) / unit + 1e-9)
    if budget * unit < widths[0] * sum(lengths):
        raise PolybitError(
            f"a mean of {mean:g} bits is below the narrowest width {widths[0]} of a block: give {widths[0]} or more"
        )
    # least[c]: least harm of the blocks so far at a cost of at most c; the choices are walked back afterwards
    least = [0.0] * (budget + 1)
    chosen: list[list[int]] = []
    for row, length in zip(harms, lengths, strict=True):
        after, picks = [inf] * (budget + 1), [0] * (budget + 1)
        for pick, (width, value) in enumerate(zip(widths, row, strict=True)):
            cost = width * length // unit
            for c in range(cost, budget + 1):
                total = least[c - cost] + float(value)
                if total < after[c]:
                    after[c], picks[c] = total, pick
        least = after
        chosen.append(picks)
    found, left = [], budget
    for picks, length in zip(reversed(chosen), reversed(lengths), strict=True):
        pick = picks[left]
        found.append(widths[pick])
        left -= widths[pick] * length // unit
    return tuple(reversed(found))
