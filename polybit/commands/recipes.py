"""Which recipe a method means by default: the kind of zero, and how long learned rounding runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from polybit.commands.compress import Recipe
from polybit.core.affine import Grid, ZeroKind

BLOCK_STEPS, FINISH_STEPS = 200, 200
FINISH_BYTES = 20  # latent, gradient, two moments of Adam and the value itself, per weight
FINISH_SHARE = 0.25  # of the machine's memory that the finish may take before it is left out


def choose(
    method: str, widths: Sequence[int], group_size: int, *, asymmetric: bool | None, effort: str, seed: int
) -> Recipe:
    """The recipe of a method; `effort` fast leaves learned rounding out."""
    bits = max(widths)
    if asymmetric is None:
        # learned rounding gains nothing from a zero point and would pay its bits (docs/results.md)
        asymmetric = method != "rounding"
    zero: ZeroKind = "group" if asymmetric else "centre"
    learned = effort != "fast" and method in ("rounding", "nested")
    return Recipe(
        method,
        Grid(bits, group_size, zero),
        tuple(widths),
        block_steps=BLOCK_STEPS if learned and method == "rounding" else 0,
        finish_steps=FINISH_STEPS if learned else 0,
        seed=seed,
    )


def within_memory(recipe: Recipe, weights: int) -> Recipe:
    """The recipe without its finish where training `weights` weights at once would crowd the machine's memory.

    Decided by the machine's total memory, not by what is free just now, so that a resumed run decides the same.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if recipe.finish_steps and FINISH_BYTES * weights > FINISH_SHARE * total:
        return replace(recipe, finish_steps=0)
    return recipe
