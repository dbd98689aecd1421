"""The best width of every layer under a budget of effective bits: a multiple-choice knapsack, solved exactly."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from polybit.core.runtime import PolybitError

TIE = 1e-9  # of the largest harm, for a whole budget of bits: of two equally harmless plans the smaller one is taken


@dataclass(frozen=True, slots=True)
class WidthChoice:
    """One width a layer may have: bits the whole layer takes (scales and zero points in it), and the harm it does."""

    bits: float
    harm: float


def solve(
    choices: Mapping[str, Mapping[int, WidthChoice]], groups: Sequence[Sequence[str]], budget_bits: float
) -> dict[str, int]:
    """The width of every layer with the least total harm whose bits are within the budget; the optimum, not a guess.

    choices: layer -> width -> WidthChoice; layers of one group get the same width, every layer is in exactly one group
    budget_bits: bits of all layers together. 224 layers with 7 widths take well under a second.

    Multiple-choice knapsack as a 0-1 programme, min Σ h x, Σ_w x_gw = 1, Σ b x <= B. Deterministic.
    Raises PolybitError when scipy is missing, a group has no width in common, or the least widths exceed the budget.
    """
    rows = [merge(choices, group) for group in groups]
    check_budget(rows, budget_bits)
    picked = programme(rows, budget_bits)
    return {name: width for group, width in zip(groups, picked, strict=True) for name in group}


def merge(choices: Mapping[str, Mapping[int, WidthChoice]], group: Sequence[str]) -> dict[int, WidthChoice]:
    """The choices of a group of layers as of one layer: the widths all of them have, bits and harms added."""
    shared = set.intersection(*(set(choices[name]) for name in group))
    if not shared:
        offered = "; ".join(f"{name}: {', '.join(map(str, sorted(choices[name])))}" for name in group)
        raise PolybitError(
            f"layers that must share a width have none in common ({offered}): offer one, or lift it with --free-groups"
        )
    return {
        width: WidthChoice(sum(choices[n][width].bits for n in group), sum(choices[n][width].harm for n in group))
        for width in sorted(shared)
    }


def check_budget(rows: Sequence[Mapping[int, WidthChoice]], budget_bits: float) -> None:
    """Refuse a budget that even the least widths exceed, and harms that are no numbers."""
    for row in rows:
        for width, choice in row.items():
            if not math.isfinite(choice.harm):
                raise PolybitError(f"the harm of {width} bits was measured as {choice.harm}: use other text or float32")
    least = sum(min(choice.bits for choice in row.values()) for row in rows)
    if least > budget_bits * (1 + 1e-12):
        raise PolybitError(
            f"the budget of {budget_bits:.0f} bits is below {least:.0f}, what the narrowest widths allowed take: "
            "raise the budget, allow narrower widths, or use a larger group size"
        )


def programme(rows: Sequence[Mapping[int, WidthChoice]], budget_bits: float) -> list[int]:
    """The width of each row by HiGHS."""
    np, milp, constraint, bounds, sparse = solver()
    owner = np.array([at for at, row in enumerate(rows) for _ in row])
    widths = [width for row in rows for width in row]
    bits = np.array([choice.bits for row in rows for choice in row.values()])
    harm = np.array([choice.harm for row in rows for choice in row.values()])
    # units near 1, or HiGHS takes harms of 1e-6 nats for its own rounding
    scale = max(float(np.abs(harm).max()), 1e-300)
    cost = harm / scale + TIE * bits / bits.sum()
    one_each = sparse.csr_matrix((np.ones(len(owner)), (owner, np.arange(len(owner)))), (len(rows), len(owner)))
    within = sparse.csr_matrix(bits[None] / budget_bits)
    with silent_stdout():
        found = milp(
            cost * len(rows),
            integrality=np.ones(len(owner)),
            bounds=bounds(0, 1),
            constraints=[constraint(one_each, 1, 1), constraint(within, -np.inf, 1)],
            options={"mip_rel_gap": 0.0},
        )
    assert found.x is not None, found.message  # the budget was checked: the narrowest widths are feasible
    chosen = [widths[at] for at in np.flatnonzero(found.x > 0.5)]
    assert len(chosen) == len(rows), "HiGHS left a layer without a width"
    return repaired(rows, chosen, budget_bits)


@contextmanager
def silent_stdout() -> Iterator[None]:
    """Keep remarks that HiGHS prints past Python out of the program's output."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def repaired(rows: Sequence[Mapping[int, WidthChoice]], chosen: list[int], budget_bits: float) -> list[int]:
    """Undo what the solver's feasibility tolerance of 1e-7 may have taken beyond the budget."""
    chosen = list(chosen)
    while sum(row[width].bits for row, width in zip(rows, chosen, strict=True)) > budget_bits * (1 + 1e-12):
        steps = []
        for at, row in enumerate(rows):
            now = row[chosen[at]]
            steps += [(c.harm - now.harm, at, w) for w, c in row.items() if c.bits < now.bits]
        _, at, width = min(steps)
        chosen[at] = width
    return chosen


def solver() -> tuple[Any, Any, Any, Any, Any]:
    """numpy and the parts of scipy, or a sentence on how to get them."""
    try:
        import numpy
        from scipy import sparse
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise PolybitError(
            "allocating bits needs scipy, which is not installed: pip install 'polybit[allocate]'"
        ) from error
    return numpy, milp, LinearConstraint, Bounds, sparse
