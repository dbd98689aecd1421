"""Where nested codes start: one scale and zero point per group with which plain slices of the codes do well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from polybit.core.affine import Grid, centre, round_half_up, scale_gain, split_groups
from polybit.kernels import search
from polybit.quant.levels import Levels
from polybit.quant.problem import Problem, row_chunks
from polybit.quant.scales import half_scale, integer_zero, search_scale, span_scale

SHRINKS = tuple(0.6 + 0.4 * i / 11 for i in range(12))
TILTS = (0.0, 0.35, 0.7, 1.0)  # how far the zero point follows the middle of an uneven group


def start_levels(problem: Problem, grid: Grid, widths: Sequence[int], emphasis: Mapping[int, float]) -> Levels:
    """Search scale and zero point of each group over clipping ranges and tilts.

    A candidate is judged by Σ_b μ_b e_b / e_b(alone): the squared error, weighted by diag(H), of the b leading bits of
    its nearest codes with the best ratio, over the error of a scale searched for this width alone.
    """
    rows, columns = problem.weight_OI.shape
    weights_Gg, _ = split_groups(problem.importance_I[None], grid.group_size)
    symmetric = Grid(grid.bits, grid.group_size)
    gain = scale_gain(span_scale(problem.weight_OI, symmetric)[0])
    alone = {b: search_scale(problem.weight_OI, Grid(b, grid.group_size), problem.importance_I)[0] for b in widths}
    if search.usable(problem.weight_OI):
        ones_OG = torch.ones_like(next(iter(alone.values())))
        ratio_BOG = torch.ones_like(ones_OG).repeat(len(widths), 1, 1)
        judged = tuple(emphasis[b] for b in widths)
        numbers = search.Numbers(
            columns, grid.group_size, grid.bits, tuple(widths), judged, ones_OG, torch.zeros_like(ones_OG), ratio_BOG
        )
        fixed = None if grid.zero == "group" else float(grid.fixed_zero() or 0.0)
        tilts = search.Tilts(gain, fixed, SHRINKS, TILTS if grid.zero == "group" else (0.0,))
        search.search_slices(numbers, problem.weight_OI, problem.importance_I, torch.stack(list(alone.values())), tilts)
        emphasis_B = ones_OG.new_ones(len(widths))
        return Levels(grid.bits, grid.group_size, tuple(widths), emphasis_B, ones_OG, numbers.zero_OG, ratio_BOG)
    found = []
    for part in row_chunks(rows, 4 * columns):
        groups_OGg, _ = split_groups(problem.weight_OI[part], grid.group_size)
        limits = {}
        for b, alone_OG in alone.items():
            codes_OGg = nearest_codes(groups_OGg, b, alone_OG[part], torch.full_like(alone_OG[part], centre(b)))
            error_OG, _ = slice_error(codes_OGg, groups_OGg, weights_Gg, b, b, alone_OG[part])
            limits[b] = emphasis[b] / error_OG.clamp_min(1e-30)
        found.append(search_rows(groups_OGg, weights_Gg, grid, limits, gain))
    scale_OG, zero_OG = (torch.cat([f[i] for f in found]) for i in (0, 1))
    ratio_BOG = torch.cat([f[2] for f in found], dim=1)
    return Levels(
        grid.bits, grid.group_size, tuple(widths), scale_OG.new_ones(len(widths)), scale_OG, zero_OG, ratio_BOG
    )


def search_rows(
    groups_OGg: Tensor, weights_Gg: Tensor, grid: Grid, limits: Mapping[int, Tensor], gain: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`start_levels` on some rows: scale, zero point, and the best ratio of each width."""
    low_OG, high_OG = groups_OGg.amin(-1), groups_OGg.amax(-1)
    middle_OG, reach_OG = (high_OG + low_OG) / 2, (high_OG - low_OG) / 2
    best_OG = torch.full_like(low_OG, torch.inf)
    scale_OG, zero_OG = torch.ones_like(low_OG), torch.zeros_like(low_OG)
    ratio_BOG = torch.ones_like(low_OG).repeat(len(limits), 1, 1)
    for tilt in TILTS if grid.zero == "group" else (0.0,):
        for shrink in SHRINKS:
            range_OG = (reach_OG + (1 - tilt) * middle_OG.abs()) * shrink
            tried_OG = half_scale(range_OG / centre(grid.bits), gain)
            if grid.zero == "group":
                point_OG = integer_zero(centre(grid.bits) - tilt * middle_OG / tried_OG, grid.bits)
            else:
                point_OG = torch.full_like(tried_OG, float(grid.fixed_zero() or 0.0))
            codes_OGg = nearest_codes(groups_OGg, grid.bits, tried_OG, point_OG)
            wanted_OGg = groups_OGg - ((centre(grid.bits) - point_OG) * tried_OG)[..., None]
            judged = [slice_error(codes_OGg, wanted_OGg, weights_Gg, grid.bits, b, tried_OG) for b in limits]
            total_OG = sum(error * limit for (error, _), limit in zip(judged, limits.values(), strict=True))
            better = total_OG < best_OG
            best_OG = torch.where(better, total_OG, best_OG)
            scale_OG, zero_OG = torch.where(better, tried_OG, scale_OG), torch.where(better, point_OG, zero_OG)
            ratio_BOG = torch.where(better, torch.stack([ratio for _, ratio in judged]), ratio_BOG)
    return scale_OG, zero_OG, ratio_BOG


def nearest_codes(groups_OGg: Tensor, bits: int, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
    """Codes of round to nearest, in floating point."""
    codes_OGg = round_half_up(groups_OGg / scale_OG[..., None] + zero_OG[..., None])
    return codes_OGg.clamp_(0, (1 << bits) - 1)


def slice_error(
    codes_OGg: Tensor, wanted_OGg: Tensor, weights_Gg: Tensor, bits: int, width: int, scale_OG: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted squared error per group of the `width` leading bits of codes, and the ratio that makes it least.

    wanted_OGg: the weights less the value of the middle of the code range.
    """
    stride = 2.0 ** (bits - width)
    level_OGg = (codes_OGg / stride).floor_().sub_(centre(width)).mul_(stride * scale_OG[..., None])
    if width == bits:
        ratio_OG = torch.ones_like(scale_OG)
    else:
        pull_OGg = level_OGg * weights_Gg
        fitted = (pull_OGg * wanted_OGg).sum(-1) / (pull_OGg * level_OGg).sum(-1)
        ratio_OG = torch.where(torch.isfinite(fitted), fitted, torch.ones_like(fitted)).clamp(0.4, 1.6)
        level_OGg.mul_(ratio_OG[..., None])
    return (level_OGg.sub_(wanted_OGg).square_().mul_(weights_Gg)).sum(-1), ratio_OG
