"""A quick start for training: codes whose leading bits serve every width, by searched scales and plain rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from polybit.core.affine import Grid, QWeight, encode, expand_groups
from polybit.quant.levels import Levels, as_qweight
from polybit.quant.nested import EMPHASIS, finish
from polybit.quant.problem import Problem, pose, row_chunks
from polybit.quant.rtn import rtn
from polybit.quant.slices import start_levels


def quick_start(weight_OI: Tensor, grid: Grid, widths: Sequence[int]) -> QWeight:
    """Codes of `grid.bits` bits read at all `widths`: one scale and zero point per group searched for the widths
    together, nearest codes, one ratio per narrower width. No data and no compensation; training does the rest.
    """
    if len(widths) == 1:
        return rtn(weight_OI, None, grid)
    widths = sorted(widths, reverse=True)
    problem = pose(weight_OI, None)
    levels = start_levels(problem, grid, widths, {b: EMPHASIS[b] for b in widths})
    rounded = lambda: encode(problem.weight_OI, levels.scale_OG, levels.zero_OG, grid.bits, grid.group_size)  # noqa: E731
    levels = fit_layer_ratios(problem, rounded(), levels)
    levels, ratios = finish(levels, {})
    fixed = grid.fixed_zero()
    zero = levels.zero_OG if fixed is None else torch.tensor(fixed, device=weight_OI.device)
    return as_qweight(rounded(), levels, problem.gain, zero, ratios)


def fit_layer_ratios(problem: Problem, codes_OI: Tensor, levels: Levels) -> Levels:
    """Best single ratio under H for each narrower width, as a 32-bit float."""
    columns, ratio_BOG = codes_OI.shape[1], levels.ratio_BOG.clone()
    free = [i for i, b in enumerate(levels.widths) if b != levels.bits]
    above, below = [0.0] * len(free), [0.0] * len(free)
    for part in row_chunks(len(codes_OI), 3 * len(levels.widths) * columns):
        local = levels.rows(part)
        offset_OI = expand_groups(local.offsets(), columns, levels.group_size)
        prefix_BOI = local.prefixes(codes_OI[part]) * local.strides()
        for place, index in enumerate(free):
            step_OI = prefix_BOI[index] * expand_groups(local.scale_OG, columns, levels.group_size)
            pushed_OI = step_OI @ problem.hessian_II
            above[place] += float((pushed_OI * (problem.weight_OI[part] - offset_OI)).sum())
            below[place] += float((pushed_OI * step_OI).sum())
    for place, index in enumerate(free):
        if below[place] > 0 and 0.1 < above[place] / below[place] < 10:
            ratio_BOG[index] = float(torch.tensor(above[place] / below[place], dtype=torch.float32))
    return replace(levels, ratio_BOG=ratio_BOG)
