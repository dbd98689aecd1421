"""HQQ: scales and zero points found without any data, by a half-quadratic fit that lets a few weights be wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from polybit.core.affine import Grid, QWeight, round_half_up, scale_gain, split_groups
from polybit.core.records import LayerStats
from polybit.quant.levels import Levels, as_qweight
from polybit.quant.problem import pose, row_chunks
from polybit.quant.scales import candidate, half_scale, integer_zero, settle, span, span_scale, stored_zero

STARTS = {2: (1.0, 0.85, 0.7, 0.55), 3: (1.0, 0.85, 0.7), 4: (1.0, 0.85)}  # clipping ranges to start from


def hqq(
    weight_OI: Tensor,
    stats: LayerStats | None,
    grid: Grid,
    *,
    norm: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
) -> QWeight:
    """Quantize from the weights alone: minimise Σ|w - s (u - z)|^norm, which forgives outliers, over z and s.

    Half-quadratic quantization (Badri and Shaji 2023, https://dropbox.github.io/hqq_blog): errors are split into a
    part shrunk by the proximal operator of the norm and a rest fitted in closed form, `beta` growing by `kappa`.
    Unlike the original, zero points stay integers, the scale is fitted too, errors are measured in steps of the
    grid (so that `beta` means the same for every weight) and at 4 bits and below there are several clipping ranges to
    start from. `stats` is ignored: the method is data-free.
    """
    problem = pose(weight_OI, None)
    gain = scale_gain(span_scale(problem.weight_OI, grid)[0])
    rows, columns = problem.weight_OI.shape
    scale_OG = problem.weight_OI.new_empty(rows, grid.groups(columns))
    zero_OG = torch.empty_like(scale_OG)
    for part in row_chunks(rows, 2 * columns):
        groups_OGg, mask_Gg = split_groups(problem.weight_OI[part], grid.group_size)
        for plain, chosen_G in grid.by_width(columns):
            found = fit_rows(groups_OGg[:, chosen_G], mask_Gg[chosen_G], plain, gain, (norm, beta, kappa, iterations))
            scale_OG[part, chosen_G], zero_OG[part, chosen_G] = found
    scale_OG = settle(scale_OG).to(problem.weight_OI.dtype)
    zero = stored_zero(zero_OG, grid)
    levels = Levels.of(grid, scale_OG, zero, columns)
    return as_qweight(levels.encode(problem.weight_OI), levels, problem.gain, zero)


def fit_rows(
    groups_OGg: Tensor, mask_Gg: Tensor, grid: Grid, gain: float, knobs: tuple[float, float, float, int]
) -> tuple[Tensor, Tensor]:
    """Scale and zero point [O, G] of some rows: every start is improved step by step.

    As in the authors' code, the iterate with the least mean absolute error is kept.
    """
    norm, first_beta, kappa, iterations = knobs
    top = (1 << grid.bits) - 1
    low, high = span(groups_OGg, grid)
    count_G = mask_Gg.sum(-1)
    least_OG = torch.full_like(low, torch.inf)
    kept = torch.ones_like(low), torch.zeros_like(low)
    for start in STARTS.get(grid.bits, (1.0,)):
        scale_OG, zero_OG = candidate(low, high, start, grid, gain)
        beta = first_beta
        for _ in range(iterations):
            steps_OGg = groups_OGg / scale_OG[..., None]
            codes_OGg = round_half_up(steps_OGg + zero_OG[..., None]).clamp_(0, top)
            level_OGg = codes_OGg - zero_OG[..., None]
            error_OGg = steps_OGg - level_OGg
            cost_OG = (error_OGg.abs() * mask_Gg).sum(-1) * scale_OG.abs()
            better = cost_OG < least_OG
            least_OG = torch.where(better, cost_OG, least_OG)
            kept = torch.where(better, scale_OG, kept[0]), torch.where(better, zero_OG, kept[1])
            rest_OGg = steps_OGg - shrink(error_OGg, beta, norm)
            if grid.zero == "group":
                zero_OG = integer_zero(((codes_OGg - rest_OGg) * mask_Gg).sum(-1) / count_G, grid.bits)
                level_OGg = codes_OGg - zero_OG[..., None]
            growth = (level_OGg * rest_OGg * mask_Gg).sum(-1) / (level_OGg.square() * mask_Gg).sum(-1)
            scale_OG = half_scale(scale_OG * torch.where(growth > 0, growth, torch.ones_like(growth)), gain)
            beta *= kappa
    return kept


def shrink(error: Tensor, beta: float, norm: float) -> Tensor:
    """Proximal operator of |x|^norm (generalised soft threshold): small errors to 0, large ones nearly kept."""
    size = error.abs()
    return error.sign() * (size - size.clamp_min(1e-8).pow(norm - 1) / beta).clamp_min(0)
