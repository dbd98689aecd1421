"""Which recipe a method means by default: the kind of zero, and how long learned rounding runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from polybit.compress.loop import Recipe
from polybit.core.affine import Grid, ZeroKind
from polybit.core.plan import Plan
from polybit.core.precision import FLOAT
from polybit.core.runtime import PolybitError

BLOCK_STEPS = 200  # learned rounding block by block, where the whole model at once does not fit
FINISH_STEPS = {"rounding": 130, "nested": 300}  # learned rounding of the whole model
FINISH_BYTES = 20  # latent, gradient, two moments of Adam and the value itself, per weight
FINISH_SHARE = 0.25  # of the machine's memory that the finish may take before it is left out


def choose(
    method: str,
    widths: Sequence[int],
    group_size: int,
    *,
    asymmetric: bool | None,
    effort: str,
    seed: int,
    plan: Plan | None = None,
) -> Recipe:
    """The recipe of a method; `effort` fast leaves learned rounding out.

    Nested codes are trained over the whole model only with `best`: it mostly trades wide widths for narrow ones and is
    then refused, for several times the seconds (docs/results.md).
    """
    bits = max(widths)
    if asymmetric is None:
        # learned rounding gains nothing from a zero point and would pay its bits (docs/results.md)
        asymmetric = method != "rounding"
    zero: ZeroKind = "group" if asymmetric else "centre"
    steps = FINISH_STEPS.get(method, 0)
    if effort == "fast" or (effort == "normal" and method == "nested"):
        steps = 0
    return Recipe(
        method,
        Grid(bits, group_size, zero),
        tuple(widths),
        finish_steps=steps,
        seed=seed,
        plan=plan,
    )


def within_memory(recipe: Recipe, weights: int) -> Recipe:
    """The recipe, rounding block by block where training `weights` weights at once would crowd the machine's memory.

    Nested codes then stay as the layers' own optimum. Decided by the machine's total memory, not by what is free just
    now, so that a resumed run decides the same.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if recipe.finish_steps and FINISH_BYTES * weights > FINISH_SHARE * total:
        return replace(recipe, finish_steps=0, block_steps=BLOCK_STEPS if recipe.method == "rounding" else 0)
    return recipe


def largest_width(plan: Plan) -> int:
    """The widest layer or block of columns of a plan."""
    plain = [precision.w for precision in (plan.default, *plan.layers.values()) if precision.w != FLOAT]
    inside = [max(c.block_widths(plan.at(name).w)) for name, c in plan.columns.items()]
    if not plain:
        raise PolybitError("the plan leaves every layer in float: give layers or the default a width such as w4")
    return max(plain + inside)
