"""A quick start for training: codes whose leading bits serve every width, by searched scales and plain rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from polybit.core.affine import Grid, QWeight, encode
from polybit.quant.levels import as_qweight
from polybit.quant.nested import EMPHASIS, finish, fit_layer_ratios
from polybit.quant.problem import pose
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
    levels = fit_layer_ratios(problem, rounded(), levels, ())
    levels, ratios = finish(levels, {})
    fixed = grid.fixed_zero()
    zero = levels.zero_OG if fixed is None else torch.tensor(fixed, device=weight_OI.device)
    return as_qweight(rounded(), levels, problem.gain, zero, ratios)
