"""Clip searches on a GPU: where every quantizer starts, a group of some rows a program. quant.scales and quant.slices
say what is done."""

from __future__ import annotations

import triton
import triton.language as tl

from polybit.kernels.triton_fit import half_scale
from polybit.kernels.triton_walk import nearest


@triton.jit
def read_group(
    weight, importance, rows, columns, size, group,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Weights [R, C] of one group and the importance [C] of its columns; zeros beyond its end and the rows'."""
    row, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    column = group * size + c
    inside = (c < size) & (column < columns)
    values = tl.load(
        weight + row.to(tl.int64)[:, None] * columns + column[None, :],
        mask=(row < rows)[:, None] & inside[None, :],
        other=0.0,
    )
    return row, values, tl.load(importance + column, mask=inside, other=0.0)


@triton.jit
def codes_of(values, scale, zero, top):
    """Nearest codes [R, C]."""
    return nearest(values / scale[:, None] + zero[:, None], values * 0, values * 0 + top)


@triton.jit
def try_clip(tried, point, values, importance, top, least, scale, zero):
    """What is best when this scale and zero point are tried too."""
    miss = (codes_of(values, tried, point, top) - point[:, None]) * tried[:, None] - values
    error = tl.sum(miss * miss * importance[None, :], 1)
    better = error < least
    return tl.where(better, error, least), tl.where(better, tried, scale), tl.where(better, point, zero)


@triton.jit
def spread(low, high, shrink, top, gain, KIND: tl.constexpr):
    """Scale and zero point that spread the codes over [low, high] times |shrink|; a negative shrink flips them."""
    if KIND == 2:
        tried = half_scale((high - low) * (shrink / top), gain)
        return tried, nearest(-low * shrink / tried, low * 0, low * 0 + top)
    if KIND == 0:
        return half_scale(high * (shrink / (top / 2)), gain), low * 0 + top / 2
    middle = (top + 1) / 2
    # one bit has no level above zero: the other sign is had by a negative shrink
    above = tl.where(top > middle, high / (top - middle), 0.0)
    return half_scale(tl.maximum(-low / middle, above) * shrink, gain), low * 0 + middle


@triton.jit
def clip_groups(
    weight, importance, bits, shrinks, scale, zero, rows, columns, size, groups, gain, points,
    KIND: tl.constexpr, REFINE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scale and zero point of one group of every row. KIND: zero point at the centre, a level, of each group;
    shrinks: of ranges below 4 bits, and of the others, [2, points]."""
    group = tl.program_id(1)
    row, values, weights = read_group(weight, importance, rows, columns, size, group, ROWS, COLUMNS)
    width = tl.load(bits + group)
    top = ((1 << width) - 1).to(values.dtype)
    ranges = shrinks + points * (width >= 4).to(tl.int32)
    low, high = tl.minimum(tl.min(values, 1), 0.0), tl.maximum(tl.max(values, 1), 0.0)
    if KIND == 0:
        high = tl.maximum(-low, high)
        low = -high
    best_scale, best_zero, least = low * 0 + 1.0, low * 0, low * 0 + float("inf")
    for n in range(0, points):
        shrink = tl.load(ranges + n)
        tried, point = spread(low, high, shrink, top, gain, KIND)
        least, best_scale, best_zero = try_clip(tried, point, values, weights, top, least, best_scale, best_zero)
        if KIND == 1:  # the side with the extra level may be either one
            tried, point = spread(-high, -low, -shrink, top, gain, KIND)
            least, best_scale, best_zero = try_clip(tried, point, values, weights, top, least, best_scale, best_zero)
    for step in range(0, REFINE * (3 if KIND == 2 else 1)):
        turn = step % 3
        point = best_zero
        if KIND == 2:  # as it is, one lower, one higher
            shift = tl.where(turn == 0, 0.0, tl.where(turn == 1, -1.0, 1.0)).to(values.dtype)
            point = tl.minimum(tl.maximum(best_zero + shift, 0.0), top)
        level = codes_of(values, best_scale, point, top) - point[:, None]
        pull = level * weights[None, :]
        fitted = tl.sum(pull * values, 1) / tl.sum(pull * level, 1)
        tried = half_scale(tl.where(fitted - fitted == 0, fitted, best_scale), gain)
        least, best_scale, best_zero = try_clip(tried, point, values, weights, top, least, best_scale, best_zero)
    tl.store(scale + row * groups + group, best_scale, mask=row < rows)
    tl.store(zero + row * groups + group, best_zero, mask=row < rows)


@triton.jit
def limits_of(
    values, weights, alone, widths, row, rows, group, groups, plane,
    COUNT: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    """Emphasis of every width over the error of the scale found for it alone, [R, WIDTHS]."""
    b = tl.arange(0, WIDTHS)[None, :]
    found = tl.zeros((values.shape[0], WIDTHS), values.dtype)
    for n in tl.static_range(COUNT):
        emphasis, middle = tl.load(widths + n), tl.load(widths + 2 * WIDTHS + n)
        size = tl.load(alone + n * plane + row * groups + group, mask=row < rows, other=1.0)
        point = size * 0 + middle
        miss = (codes_of(values, size, point, 2 * middle) - middle) * size[:, None] - values
        error = tl.sum(miss * miss * weights[None, :], 1)
        found = tl.where(b == n, (emphasis / tl.maximum(error, 1e-30))[:, None], found)
    return found


@triton.jit
def slice_groups(
    weight, importance, alone, shrinks, tilts, scale, zero, ratio, widths,
    rows, columns, size, groups, plane, gain, fixed_zero, shrink_count, tilt_count, top,
    FREE: tl.constexpr, COUNT: tl.constexpr, WIDTHS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Scale, zero point and ratios of one group of every row; FREE: zero points are; widths: as in triton_walk."""
    group = tl.program_id(1)
    row, values, weights = read_group(weight, importance, rows, columns, size, group, ROWS, COLUMNS)
    real = (tl.arange(0, COLUMNS) < size)[None, :]  # what a short group lacks counts as zeros
    limits = limits_of(values, weights, alone, widths, row, rows, group, groups, plane, COUNT, WIDTHS)
    low = tl.min(tl.where(real, values, float("inf")), 1)
    high = tl.max(tl.where(real, values, -float("inf")), 1)
    middle, reach, half = (high + low) / 2, (high - low) / 2, top / 2
    b = tl.arange(0, WIDTHS)[None, :]
    best_scale, best_zero, least = low * 0 + 1.0, low * 0, low * 0 + float("inf")
    best_ratio = tl.zeros((ROWS, WIDTHS), values.dtype) + 1.0
    for n in range(0, tilt_count * shrink_count):
        tilt, shrink = tl.load(tilts + n // shrink_count), tl.load(shrinks + n % shrink_count)
        tried = half_scale((reach + (1 - tilt) * tl.abs(middle)) * shrink / half, gain)
        point = low * 0 + fixed_zero
        if FREE:
            point = nearest(half - tilt * middle / tried, low * 0, low * 0 + top)
        code = codes_of(values, tried, point, top)
        wanted = values - ((half - point) * tried)[:, None]
        total, found = low * 0, tl.zeros((ROWS, WIDTHS), values.dtype) + 1.0
        for width in tl.static_range(COUNT):
            stride, centre = tl.load(widths + WIDTHS + width), tl.load(widths + 2 * WIDTHS + width)
            level = (tl.floor(code / stride) - centre) * (stride * tried)[:, None]
            fitted = low * 0 + 1.0
            if width > 0:
                pull = level * weights[None, :]
                best = tl.sum(pull * wanted, 1) / tl.sum(pull * level, 1)
                fitted = tl.minimum(tl.maximum(tl.where(best - best == 0, best, 1.0), 0.4), 1.6)
            miss = level * fitted[:, None] - wanted
            error = tl.sum(miss * miss * weights[None, :], 1)
            total += error * tl.sum(tl.where(b == width, limits, 0.0), 1)
            found = tl.where(b == width, fitted[:, None], found)
        better = total < least
        least, best_scale = tl.where(better, total, least), tl.where(better, tried, best_scale)
        best_zero = tl.where(better, point, best_zero)
        best_ratio = tl.where(better[:, None], found, best_ratio)
    at = row * groups + group
    tl.store(scale + at, best_scale, mask=row < rows)
    tl.store(zero + at, best_zero, mask=row < rows)
    place = ratio + b * plane + at[:, None]
    tl.store(place, best_ratio, mask=(row < rows)[:, None] & (b < COUNT))
