"""AWQ: columns with strong inputs are scaled up before rounding, so that their weights are rounded more finely."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from polybit.core.affine import Grid, QWeight
from polybit.core.records import LayerStats
from polybit.quant.levels import Levels, as_qweight
from polybit.quant.problem import pose
from polybit.quant.rtn import rtn
from polybit.quant.scales import search_scale

SAMPLE_ROWS = 1024  # output rows the search looks at
COARSE_POINTS = 8  # clipping ranges tried while the exponent is searched


def awq(weight_OI: Tensor, stats: LayerStats | None, grid: Grid, *, points: int = 20, clip: int = 30) -> QWeight:
    """Round to nearest after scaling each input column by a power of its mean input magnitude.

    AWQ (Lin et al., arXiv 2306.00978, eq. 4-5): column j is multiplied by mean|x_j|^alpha, alpha searched over `points`
    values in [0, 1] for least output error, then the clipping range over `clip` values. Unlike the paper, the inverse
    is stored with the weight (`QWeight.column_scale_I`, 16 bits per column) instead of being folded into the layer
    before, the output error is tr(E H Eᵀ) of the calibration Hessian, and alpha is judged with a coarse clip search
    on at most 1024 rows. Where no exponent helps, and without statistics, this is `rtn`.
    """
    plain = rtn(weight_OI, stats, grid, points=clip)
    if stats is None:
        return plain
    problem = pose(weight_OI, stats, damp=0.0)
    rows_RI = problem.weight_OI[:: -(-len(weight_OI) // SAMPLE_ROWS)]

    def quantized(part_OI: Tensor, column_I: Tensor, tries: int) -> QWeight:
        scaled_OI = part_OI / column_I
        importance_I = problem.importance_I * column_I.square()
        scale_OG, zero = search_scale(scaled_OI, grid, importance_I, points=tries)
        levels = Levels.of(grid, scale_OG, zero, weight_OI.shape[1])
        return as_qweight(levels.encode(scaled_OI), levels, 1.0, zero, column_scale_I=column_I.float())

    def harm(part_OI: Tensor, q: QWeight) -> float:
        error_OI = q.dequantize().to(part_OI) - part_OI
        return float(((error_OI @ problem.hessian_II) * error_OI).sum())

    columns = [column_scale(stats.absmean_I.to(rows_RI), exponent / points) for exponent in range(points + 1)]
    harms = [harm(rows_RI, quantized(rows_RI, column_I, COARSE_POINTS)) for column_I in columns]
    best = min(range(len(harms)), key=harms.__getitem__)
    if best == 0:
        return plain
    chosen = quantized(problem.weight_OI, columns[best], clip)
    unscaled = replace(plain, scale_OG=(plain.scale_OG.double() / problem.gain).float())
    if harm(problem.weight_OI, chosen) >= harm(problem.weight_OI, unscaled):
        return plain
    return replace(chosen, scale_OG=(chosen.scale_OG.double() * problem.gain).float())


def column_scale(absmean_I: Tensor, exponent: float) -> Tensor:
    """What the quantized columns are multiplied with: mean|x|^-alpha, its ends balanced around 1, exact in 16 bits."""
    magnitude_I = absmean_I / absmean_I.max().clamp_min(torch.finfo(torch.float32).tiny)
    scale_I = magnitude_I.clamp_min(1e-4).pow(-exponent)
    return (scale_I / (scale_I.max() * scale_I.min()).sqrt()).half().to(absmean_I)
