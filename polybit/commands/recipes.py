"""Which recipe a method means by default: the kind of zero, and how long learned rounding runs."""

from __future__ import annotations

from collections.abc import Sequence

from polybit.commands.compress import Recipe
from polybit.core.affine import Grid, ZeroKind

BLOCK_STEPS, FINISH_STEPS = 200, 200


def choose(
    method: str, widths: Sequence[int], group_size: int, *, asymmetric: bool | None, effort: str, seed: int
) -> Recipe:
    """The recipe of a method; `effort` fast leaves learned rounding out."""
    bits = max(widths)
    if asymmetric is None:
        # learned rounding gains nothing from a zero point and would pay its bits (docs/results.md)
        asymmetric = method != "rounding"
    zero: ZeroKind = "group" if asymmetric else "centre"
    learned = effort != "fast" and method == "rounding"
    return Recipe(
        method,
        Grid(bits, group_size, zero),
        tuple(widths),
        block_steps=BLOCK_STEPS if learned else 0,
        finish_steps=FINISH_STEPS if learned else 0,
        seed=seed,
    )
