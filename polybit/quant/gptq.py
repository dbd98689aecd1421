"""GPTQ: columns are quantized one after another and each passes its error on to the rest of its row."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from polybit.core.affine import Grid, QWeight, scale_gain
from polybit.core.records import LayerStats
from polybit.quant.descent import Walked, compensate, relevelled, walk
from polybit.quant.fit import FitFreedom
from polybit.quant.levels import Levels, as_qweight
from polybit.quant.problem import Problem, inverse_factor, pose
from polybit.quant.scales import search_scale, settle


def gptq(
    weight_OI: Tensor,
    stats: LayerStats | None,
    grid: Grid,
    *,
    damp: float = 0.01,
    act_order: bool = False,
    refit: bool = True,
    descent_sweeps: int = 6,
) -> QWeight:
    """Quantize a layer so that its outputs, not its weights, change least.

    GPTQ (Frantar et al., arXiv 2210.17323) with scales fixed in advance by a clip search. Unlike the paper, coordinate
    descent follows: `descent_sweeps` passes in which (`refit`) each group's scale and zero point are fitted by least
    squares under H and each code is chosen again given all others. The layer loss tr(E H Eᵀ) never rises in them.
    `descent_sweeps=0` is the classic method. act_order: the most excited input columns first (groups stay in place).
    Without statistics H is the identity. Raises PolybitError for weights or statistics that are not finite.
    """
    problem = pose(weight_OI, stats, damp=damp)
    scale_OG, zero = search_scale(problem.weight_OI, grid, problem.importance_I)
    levels = Levels.of(grid, scale_OG, zero, weight_OI.shape[1])
    order_I = torch.argsort(problem.importance_I, descending=True, stable=True) if act_order else None
    codes_OI = compensate(problem, factor(problem, order_I), levels, order_I)
    if descent_sweeps:
        codes_OI, levels = improve(problem, codes_OI, levels, sweeps=descent_sweeps, refit=refit, zero=zero)
    return as_qweight(codes_OI, levels, problem.gain, levels.zero_OG if zero.ndim else zero)


def factor(problem: Problem, order_I: Tensor | None) -> Tensor:
    """Factor of the inverse Hessian with its columns in processing order."""
    hessian = problem.hessian_II
    return inverse_factor(hessian if order_I is None else hessian[order_I][:, order_I])


def improve(
    problem: Problem, codes_OI: Tensor, levels: Levels, *, sweeps: int, refit: bool, zero: Tensor
) -> tuple[Tensor, Levels]:
    """Coordinate descent from given codes of one width, ending with storable scales.

    `zero` tells whether zero points are free: [O, G] yes, 0-dim no. The last pass moves codes only.
    """
    at = Walked(codes_OI, levels)
    if refit:
        freedom = FitFreedom(scale_gain(levels.scale_OG), zero=bool(zero.ndim))
        at = walk(problem, at, sweeps=sweeps, freedom=freedom)
        at = relevelled(problem, at, replace(at.levels, scale_OG=settle(at.levels.scale_OG).to(at.levels.scale_OG)))
        sweeps = 1
    at = walk(problem, at, sweeps=sweeps, freedom=None)
    return at.codes_OI, at.levels
