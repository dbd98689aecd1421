"""Round to nearest: every weight to its closest code, after a search for the best clipping range."""

from __future__ import annotations

from torch import Tensor

from polybit.core.affine import Grid, QWeight
from polybit.core.records import LayerStats
from polybit.quant.levels import Levels, as_qweight
from polybit.quant.problem import pose
from polybit.quant.scales import search_scale, span_scale, stored_zero


def rtn(weight_OI: Tensor, stats: LayerStats | None, grid: Grid, *, search: bool = True, points: int = 30) -> QWeight:
    """Round each weight to the nearest code; the fastest quantizer, and with its clip search a strong one.

    search: try `points` clipping ranges per group and keep the one with least squared error, weighted by the input
    energy of each column when there are statistics; False: plain min-max range.
    Raises PolybitError for weights that are not finite.
    """
    problem = pose(weight_OI, stats)
    if search:
        importance_I = None if stats is None else problem.importance_I
        scale_OG, zero = search_scale(problem.weight_OI, grid, importance_I, points=points)
    else:
        scale_OG, zero_OG = span_scale(problem.weight_OI, grid)
        zero = stored_zero(zero_OG, grid)
    levels = Levels.of(grid, scale_OG, zero, weight_OI.shape[1])
    return as_qweight(levels.encode(problem.weight_OI), levels, problem.gain, zero)
