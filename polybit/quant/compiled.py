"""The walks over columns by the fast search, compiled or on a GPU: what `quant.descent` specifies, in less time."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from polybit.kernels import search
from polybit.quant.levels import Levels
from polybit.quant.problem import Problem


def numbers(levels: Levels, problem: Problem) -> search.Numbers:
    """Levels as the compiled search reads and writes them: tensors of its own."""

    def own(tensor: Tensor) -> Tensor:
        return tensor.to(problem.weight_OI, copy=True).contiguous()

    return search.Numbers(
        problem.weight_OI.shape[1],
        levels.group_size,
        levels.bits,
        levels.widths,
        tuple(levels.emphasis_B.tolist()),
        own(levels.scale_OG),
        own(levels.zero_OG),
        own(levels.ratio_BOG),
        () if levels.bits_G is None else tuple(levels.bits_G.tolist()),
    )


def compensate(problem: Problem, factor_II: Tensor, levels: Levels, order_I: Tensor) -> tuple[Tensor, Tensor]:
    """`descent.compensate` compiled; codes, int64 [O, I], and the loss of every width and row, [B, O]."""
    groups_I = order_I // levels.group_size if levels.group_size else order_I * 0
    ordered_OI = problem.weight_OI.index_select(1, order_I)
    found_OI, loss_BO = search.compensate(numbers(levels, problem), ordered_OI, factor_II, groups_I)
    return torch.empty_like(found_OI).index_copy_(1, order_I, found_OI).long(), loss_BO


def walk(
    problem: Problem, levels: Levels, codes_OI: Tensor, gradient_BOI: Tensor | None, asked: search.Walk
) -> tuple[Tensor, Levels, Tensor]:
    """Coordinate descent compiled; new codes, int64, levels, and the gradient there."""
    found = numbers(levels, problem)
    start = problem.weight_OI if gradient_BOI is None else gradient_BOI
    moved_OI, gradient_BOI = search.descend(found, start, problem.hessian_II, codes_OI, asked)
    fitted = replace(levels, scale_OG=found.scale_OG, zero_OG=found.zero_OG, ratio_BOG=found.ratio_BOG)
    return moved_OI.long(), fitted, gradient_BOI
