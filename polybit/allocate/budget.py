"""What a budget of bits can buy: the choices of every layer, pinned widths, several budgets, and even spending."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise

from polybit.allocate.knapsack import WidthChoice, merge, solve
from polybit.core.records import CostTable
from polybit.core.runtime import PolybitError

Bits = Mapping[str, Mapping[int, float]]  # layer -> width -> effective bits of the whole layer
Choices = Mapping[str, Mapping[int, WidthChoice]]


def pinned(pins: Sequence[tuple[str, int]], names: Sequence[str], widths: Sequence[int]) -> dict[str, int]:
    """Layer -> the width it must have, from (pattern, width)."""
    found: dict[str, int] = {}
    for pattern, width in pins:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise PolybitError(f"--pin {pattern}={width} matches no layer; layers are named like {names[0]!r}")
        if width not in widths:
            raise PolybitError(
                f"--pin {pattern}={width} is none of the widths {', '.join(map(str, widths))}: add it to --widths"
            )
        for name in matching:
            if found.setdefault(name, width) != width:
                raise PolybitError(f"layer {name!r} is pinned to {found[name]} and to {width} bits: keep one --pin")
    return found


def check_mean(mean: float, bits: Bits, weights: int, group_size: int) -> None:
    """Refuse a mean of bits per weight that no assignment of the widths can meet; `weights`: of all layers."""
    widths = sorted(next(iter(bits.values())))
    low, high = (sum(row[w] for row in bits.values()) / weights for w in (widths[0], widths[-1]))
    if not low <= mean <= high:
        side = "below" if mean < low else "above"
        end = "smallest" if mean < low else "largest"
        raise PolybitError(
            f"--bits {mean:g} is {side} {low if mean < low else high:.3f}, the {end} that widths "
            f"{','.join(map(str, widths))} give in groups of {group_size or 'a row'}: "
            f"choose {low:.3f} to {high:.3f}, or change --widths or --group-size"
        )


def choices_of(bits: Bits, table: CostTable, pins: Mapping[str, int]) -> dict[str, dict[int, WidthChoice]]:
    """What every layer may have: effective bits of the whole layer, and harm."""
    return {
        name: {w: WidthChoice(row[w], table.nats[name][w]) for w in row if pins.get(name, w) == w}
        for name, row in bits.items()
    }


def bits_of(plan: Mapping[str, int], choices: Choices) -> float:
    """Effective bits of a plan."""
    return sum(choices[name][width].bits for name, width in plan.items())


def plans_at_budgets(choices: Choices, groups: Sequence[Sequence[str]], count: int) -> list[dict[str, int]]:
    """Solved plans at `count` evenly spaced budgets from the narrowest to the widest, each plan once."""
    low, high = (sum(end(c.bits for c in row.values()) for row in choices.values()) for end in (min, max))
    least = sum(min(c.bits for c in merge(choices, group).values()) for group in groups)
    found: dict[tuple[tuple[str, int], ...], dict[str, int]] = {}
    for at in range(count):
        plan = solve(choices, groups, max(low + (high - low) * at / max(count - 1, 1), least))
        found.setdefault(tuple(sorted(plan.items())), plan)
    return list(found.values())


def even(bits: float, points: Sequence[tuple[float, float]]) -> float:
    """What spending the bits evenly would score: the line between the neighbouring uniform widths, on a log scale.

    The score falls geometrically with the width, so this line lies below the straight one: it is the harder bar.
    """
    points = sorted(points)
    for (low, worse), (high, better) in pairwise(points):
        if low <= bits <= high:
            share = (bits - low) / (high - low)
            return math.exp((1 - share) * math.log(max(worse, 1e-12)) + share * math.log(max(better, 1e-12)))
    return points[0][1] if bits < points[0][0] else points[-1][1]
