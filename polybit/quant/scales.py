"""Scales and zero points: the search every quantizer starts from, with the stored rounding inside."""

from __future__ import annotations

import torch
from torch import Tensor

from polybit.core.affine import Grid, centre, round_half_up, scale_gain, split_groups, storable_scale
from polybit.kernels import search
from polybit.quant.problem import row_chunks


def settle(scale_OG: Tensor) -> Tensor:
    """Scales as the checkpoint keeps them, a fixed point of `storable_scale`.

    One rounding can carry the largest scale to the next power of two, which changes the layer's gain and with it the
    smallest scales; the second rounding finds the gain at rest.
    """
    return storable_scale(storable_scale(scale_OG))


def half_scale(scale: Tensor, gain: float) -> Tensor:
    """Round scales to 16-bit floats times a given power of two, keeping the dtype; never zero."""
    half = (scale / gain).clamp(-65504, 65504).half()
    return torch.where(half == 0, torch.full_like(half, 2.0**-24), half).to(scale.dtype) * gain


def span_scale(weight_OI: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Plain min-max scale and zero point: every weight is inside the range. Returns (scale_OG, zero) [O, G] both."""
    groups_OGg, _ = split_groups(weight_OI, grid.group_size)
    if grid.bits_G is None:
        low_OG, high_OG = span(groups_OGg, grid)
        scale_OG, zero_OG = candidate(low_OG, high_OG, 1.0, grid, None)
        scale_OG = settle(scale_OG).to(weight_OI.dtype)
        return scale_OG, integer_zero(-low_OG / scale_OG, grid.bits) if grid.zero == "group" else zero_OG
    scale_OG, zero_OG = torch.empty_like(groups_OGg[..., 0]), torch.empty_like(groups_OGg[..., 0])
    for plain, chosen_G in grid.by_width(weight_OI.shape[1]):
        span_OG = span(groups_OGg[:, chosen_G], plain)
        scale_OG[:, chosen_G], zero_OG[:, chosen_G] = candidate(*span_OG, 1.0, plain, None)
    scale_OG = settle(scale_OG).to(weight_OI.dtype)
    if grid.zero == "group":
        for plain, chosen_G in grid.by_width(weight_OI.shape[1]):
            low_OG, _ = span(groups_OGg[:, chosen_G], plain)
            zero_OG[:, chosen_G] = integer_zero(-low_OG / scale_OG[:, chosen_G], plain.bits)
    return scale_OG, zero_OG


def search_scale(
    weight_OI: Tensor, grid: Grid, importance_I: Tensor | None = None, *, points: int = 30, refine: int = 2
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group by a clip search: the range shrinks in `points` steps, least error wins.

    The error is the squared rounding error, weighted per input column by `importance_I` (diag H) when given. Each of
    the `refine` steps then fits the scale to its codes by least squares and tries the neighbouring zero points.
    Returns (scale_OG, zero): storable scales; zero is [O, G] for an asymmetric grid and 0-dim otherwise.
    """
    rows, columns = weight_OI.shape
    weights_I = torch.ones_like(weight_OI[0]) if importance_I is None else importance_I.to(weight_OI.dtype)
    weights_Gg, _ = split_groups(weights_I[None], grid.group_size)
    gain = scale_gain(span_scale(weight_OI, grid)[0])
    if search.usable(weight_OI):
        bits_G = tuple(grid.group_bits(columns).tolist())
        clips = search.Clips(grid.group_size, bits_G, grid.zero, gain, (shrinks(2, points), shrinks(4, points)), refine)
        scale_OG, zero_OG = search.search_scales(weight_OI, weights_I, clips)
        return settle(scale_OG).to(weight_OI.dtype), stored_zero(zero_OG, grid)
    scale_OG = weight_OI.new_empty(rows, grid.groups(columns))
    zero_OG = torch.empty_like(scale_OG)
    for part in row_chunks(rows, columns + grid.group_size):
        groups_OGg, _ = split_groups(weight_OI[part], grid.group_size)
        for plain, chosen_G in grid.by_width(columns):
            found = search_rows(groups_OGg[:, chosen_G], weights_Gg[:, chosen_G], plain, gain, points, refine)
            scale_OG[part, chosen_G], zero_OG[part, chosen_G] = found
    return settle(scale_OG).to(weight_OI.dtype), stored_zero(zero_OG, grid)


def shrinks(bits: int, points: int) -> tuple[float, ...]:
    """Clipping ranges worth trying: 2- and 3-bit ranges profit from hard clipping, 8-bit ranges from none."""
    return tuple(torch.linspace(1.0, 0.3 if bits < 4 else 0.5, points).tolist())


def stored_zero(zero_OG: Tensor, grid: Grid) -> Tensor:
    """Zero points as the grid stores them: [O, G], or 0-dim where all groups share that of the widest."""
    fixed = grid.fixed_zero()
    return zero_OG if fixed is None else torch.tensor(fixed, device=zero_OG.device)


def search_rows(
    groups_OGg: Tensor, weights_Gg: Tensor, grid: Grid, gain: float, points: int, refine: int
) -> tuple[Tensor, Tensor]:
    """`search_scale` on some rows, already cut into groups."""
    low, high = span(groups_OGg, grid)
    top = (1 << grid.bits) - 1
    best_OG = torch.full_like(low, torch.inf)
    scale_OG, zero_OG = torch.ones_like(low), torch.zeros_like(low)

    def consider(scale: Tensor, zero: Tensor) -> None:
        nonlocal best_OG, scale_OG, zero_OG
        codes = round_half_up(groups_OGg / scale[..., None] + zero[..., None]).clamp_(0, top)
        error = (codes.sub_(zero[..., None]).mul_(scale[..., None]).sub_(groups_OGg)).square_().mul_(weights_Gg)
        total = error.sum(-1)
        better = total < best_OG
        best_OG = torch.where(better, total, best_OG)
        scale_OG, zero_OG = torch.where(better, scale, scale_OG), torch.where(better, zero, zero_OG)

    for shrink in shrinks(grid.bits, points):
        consider(*candidate(low, high, shrink, grid, gain))
        if grid.zero == "level":  # the side with the extra level may be either one
            consider(*candidate(-high, -low, -shrink, grid, gain))
    for _ in range(refine):
        shifts = (0.0, -1.0, 1.0) if grid.zero == "group" else (0.0,)
        for shift in shifts:
            zero = (zero_OG + shift).clamp(0, top) if grid.zero == "group" else zero_OG
            levels = round_half_up(groups_OGg / scale_OG[..., None] + zero[..., None]).clamp_(0, top)
            levels.sub_(zero[..., None])
            fitted = (levels * groups_OGg * weights_Gg).sum(-1) / (levels.square() * weights_Gg).sum(-1)
            consider(half_scale(torch.where(torch.isfinite(fitted), fitted, scale_OG), gain), zero)
    return scale_OG, zero_OG


def span(groups_OGg: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, zero included; symmetric grids use the larger magnitude twice."""
    low, high = groups_OGg.amin(-1).clamp_max(0), groups_OGg.amax(-1).clamp_min(0)
    if grid.zero == "centre":
        high = torch.maximum(-low, high)
        low = -high
    return low, high


def candidate(low: Tensor, high: Tensor, shrink: float, grid: Grid, gain: float | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point that spread the codes over [low, high] times |shrink|; a negative shrink flips the codes.

    With gain None the scale is left unrounded.
    """
    top = (1 << grid.bits) - 1
    middle = grid.fixed_zero()
    if middle is None:
        scale = (high - low) * (shrink / top)
    elif grid.zero == "centre":
        scale = high * (shrink / centre(grid.bits))
    else:
        # one bit has no level above zero: the other sign is had by a negative shrink
        above = high / (top - middle) if top > middle else torch.zeros_like(high)
        scale = torch.maximum(-low / middle, above) * shrink
    if gain is not None:
        scale = half_scale(scale, gain)
    if middle is not None:
        return scale, torch.full_like(scale, middle)
    return scale, integer_zero(-low * shrink / scale, grid.bits)


def integer_zero(zero: Tensor, bits: int) -> Tensor:
    """Zero points rounded to integers of `bits` bits; 0 where a group has no extent."""
    return round_half_up(torch.where(torch.isfinite(zero), zero, torch.zeros_like(zero))).clamp(0, (1 << bits) - 1)
