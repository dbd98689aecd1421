"""The walks over columns by the compiled search: what `quant.descent` specifies, many times faster."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from polybit.kernels import search
from polybit.quant.fit import FitFreedom
from polybit.quant.levels import Levels
from polybit.quant.problem import Problem


def numbers(levels: Levels, problem: Problem) -> search.Numbers:
    """Levels as the compiled search reads and writes them: tensors of its own."""

    def own(tensor: Tensor) -> Tensor:
        return tensor.to(problem.weight_OI, copy=True).contiguous()

    return search.Numbers(
        problem.weight_OI.shape[1],
        levels.group_size,
        levels.widths,
        tuple(levels.emphasis_B.tolist()),
        own(levels.scale_OG),
        own(levels.zero_OG),
        own(levels.ratio_BOG),
        () if levels.bits_G is None else tuple(levels.bits_G.tolist()),
    )


def compensate(problem: Problem, factor_II: Tensor, levels: Levels, order_I: Tensor) -> Tensor:
    """`descent.compensate` compiled; codes int64 [O, I]."""
    groups_I = order_I // levels.group_size if levels.group_size else order_I * 0
    ordered_OI = problem.weight_OI.index_select(1, order_I)
    codes_OI = search.compensate(numbers(levels, problem), ordered_OI, factor_II, groups_I.tolist()).long()
    return codes_OI.new_empty(codes_OI.shape).index_copy_(1, order_I, codes_OI)


def descend(
    problem: Problem, codes_OI: Tensor, levels: Levels, *, sweeps: int, freedom: FitFreedom | None, held: int = 0
) -> tuple[Tensor, Levels]:
    """`descent.descend` compiled; new codes, int64, and levels."""
    found = numbers(levels, problem)
    fit = None
    if freedom is not None:
        fit = search.Fit(freedom.gain, freedom.zero, tuple(freedom.tables.get(b) for b in levels.widths))
    moved_OI, _ = search.descend(found, problem.weight_OI, problem.hessian_II, codes_OI, sweeps, fit, held)
    return moved_OI.long(), replace(levels, scale_OG=found.scale_OG, zero_OG=found.zero_OG, ratio_BOG=found.ratio_BOG)
