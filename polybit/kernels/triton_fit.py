"""Least-squares scale, zero point and ratios of one group on a GPU, as they are stored: quant.fit says what is done."""

from __future__ import annotations

import triton
import triton.language as tl

from polybit.kernels.triton_walk import meaning, nearest, values_of


@triton.jit
def half_scale(x, gain):
    """Rounded to a binary16 times `gain`, a power of two; never zero. By bits, so that it is the same everywhere."""
    y = (x / gain).to(tl.float32)
    size = tl.minimum(tl.abs(y), 65504.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000).to(tl.float32, bitcast=True)
    small = (size + 0.5) - 0.5  # below 2^-14 the steps are 2^-24 wide
    half = tl.where(size < 6.103515625e-5, small, normal)
    half = tl.where(half == 0, 5.9604644775390625e-8, tl.where(y < 0, -half, half))
    return half.to(x.dtype) * gain


@triton.jit
def square_of(o, r, a, c, d):
    """The part of the cost that goes with s², every width, [B, R]."""
    return r * r * a + 2.0 * r * o[None, :] * c + (o * o)[None, :] * d


@triton.jit
def best_scale(o, r, otherwise, emphasis, a, c, d, p, q, gain):
    """Best scale, rounded; `otherwise` where every value is 0 whatever the scale."""
    above = tl.sum(emphasis * (r * p + o[None, :] * q), 0)
    best = above / tl.sum(emphasis * square_of(o, r, a, c, d), 0)
    return half_scale(tl.where((best - best == 0) & (best != 0), best, otherwise), gain)


@triton.jit
def consider(s, o, r, least, scale, offset, ratio, emphasis, a, c, d, p, q):
    """What is best when (s, o, r) is tried too."""
    part = (s * s)[None, :] * square_of(o, r, a, c, d) - 2.0 * s[None, :] * (r * p + o[None, :] * q)
    cost = tl.sum(emphasis * part, 0)
    better = cost < least
    return (
        tl.where(better, cost, least),
        tl.where(better, s, scale),
        tl.where(better, o, offset),
        tl.where(better[None, :], r, ratio),
    )


@triton.jit
def nearest_ratio(wanted, now, table, has_table):
    """The value of a width's table [B, 16] nearest to each wanted ratio [B, R]; where there is none, what is now."""
    away = tl.abs(wanted[:, :, None] - table[:, None, :])
    best = tl.argmin(tl.where(away == away, away, 0.0), 2)
    here = tl.arange(0, 16)[None, None, :] == best[:, :, None]
    return tl.where(has_table, tl.sum(tl.where(here, table[:, None, :], 0.0), 2), now)


@triton.jit
def moments(
    codes, gradient, pushed, sums, row, rows, columns, first, count, size, offset, ratio, stride, centre,
    COUNT: tl.constexpr, WIDTHS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """a, c, p, q of quant.fit.Quadratic, [B, R]."""
    b = tl.arange(0, WIDTHS)
    line = b[:, None] * rows + row[None, :]
    a = ratio * 0
    c, p, q = a, a, a
    for start in range(0, count, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = (row < rows)[:, None] & (column < count)[None, :]
        inside = there[None, :, :] & (b < COUNT)[:, None, None]
        code = tl.load(codes + row[:, None] * columns + first + column[None, :], mask=there, other=0).to(a.dtype)
        prefix = (tl.floor(code[None, :, :] / stride[:, :, None]) - centre[:, :, None]) * stride[:, :, None]
        prefix = tl.where(inside, prefix, 0.0)
        far = tl.load(pushed + line[:, :, None] * count + column[None, None, :], mask=inside, other=0.0)
        slope = tl.load(gradient + line[:, :, None] * columns + first + column[None, None, :], mask=inside, other=0.0)
        one = tl.load(sums + first + column, mask=column < count, other=0.0)
        wanted = size[None, :, None] * (ratio[:, :, None] * far + offset[None, :, None] * one[None, None, :]) - slope
        wanted = tl.where(inside, wanted, 0.0)
        a += tl.sum(prefix * far, 2)
        c += tl.sum(far, 2)
        p += tl.sum(prefix * wanted, 2)
        q += tl.sum(wanted, 2)
    return a, c, p, q


@triton.jit
def zero_near(r, otherwise, middle, top, all_emphasis, emphasis, a, c, d, p, q):
    """Zero point, rounded, that is best when the scale is free too."""
    vv, v1 = tl.sum(emphasis * r * r * a, 0), tl.sum(emphasis * r * c, 0)
    wv, w1 = tl.sum(emphasis * r * p, 0), tl.sum(emphasis * q, 0)
    best = (vv * w1 - v1 * wv) / (d * all_emphasis * wv - v1 * w1)
    return nearest(middle - tl.where(best - best == 0, best, otherwise), otherwise * 0, otherwise * 0 + top)


@triton.jit
def fit_rows(
    codes, gradient, pushed, sums, whole, moved, scale, zero, ratio, tops, widths, tables, has_tables,
    rows, columns, first, count, group, groups, plane, moved_apart, gain,
    COUNT: tl.constexpr, WIDTHS: tl.constexpr, ZERO: tl.constexpr, TABLES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Writes scale, zero point and ratios of one group, and how far its values move by it, [B, rows, `moved_apart`].

    pushed: prefixes times the Hessian inside the group, [B, rows, count] · sums: of the Hessian over the rows of a
    column's group, [columns] · whole: its sum over the group, [groups] · tables: [B, 16].
    """
    row, b = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTHS)
    line, within = b[:, None] * rows + row[None, :], row < rows
    step, _, centre, stride, shift, top = meaning(
        scale, zero, ratio, tops, widths, row, rows, group, groups, plane, COUNT, WIDTHS
    )
    emphasis, d, at = tl.load(widths + b)[:, None], tl.load(whole + group), row * groups + group
    known = within[None, :] & (b < COUNT)[:, None]
    size = tl.load(scale + at, mask=within, other=1.0)
    start = tl.load(ratio + b[:, None] * plane + at[None, :], mask=known, other=1.0)
    middle = top / 2
    offset = middle - tl.load(zero + at, mask=within, other=0.0)
    a, c, p, q = moments(
        codes, gradient, pushed, sums, row, rows, columns, first, count, size, offset, start, stride, centre,
        COUNT, WIDTHS, ROWS, COLUMNS,
    )  # fmt: skip
    best_s, best_o, best_r = size, offset, start
    part = (size * size)[None, :] * square_of(offset, start, a, c, d)
    least = tl.sum(emphasis * (part - 2.0 * size[None, :] * (start * p + offset[None, :] * q)), 0)
    near = offset
    if ZERO:
        near = zero_near(start, offset, middle, top, tl.sum(tl.sum(emphasis, 1), 0), emphasis, a, c, d, p, q)
    table = tl.load(tables + b[:, None] * 16 + tl.arange(0, 16)[None, :])
    has_table = tl.load(has_tables + b)[:, None] != 0
    for n in tl.static_range(4 if ZERO else 1):
        o = offset
        if n > 0:
            o = middle - tl.minimum(tl.maximum(near + (0 if n == 1 else (-1 if n == 2 else 1)), 0.0), top)
        r = start
        s = best_scale(o, r, size, emphasis, a, c, d, p, q, gain)
        least, best_s, best_o, best_r = consider(s, o, r, least, best_s, best_o, best_r, emphasis, a, c, d, p, q)
        if TABLES:
            for _ in tl.static_range(2):
                r = nearest_ratio((p / s[None, :] - o[None, :] * c) / a, r, table, has_table)
                s = best_scale(o, r, size, emphasis, a, c, d, p, q, gain)
                least, best_s, best_o, best_r = consider(
                    s, o, r, least, best_s, best_o, best_r, emphasis, a, c, d, p, q
                )
    tl.store(scale + at, best_s, mask=within)
    tl.store(zero + at, middle - best_o, mask=within)
    tl.store(ratio + b[:, None] * plane + at[None, :], best_r, mask=known)
    new_step, new_shift = best_s[None, :] * best_r * stride, best_s * (middle - (middle - best_o))
    for begin in range(0, count, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        there = within[:, None] & (column < count)[None, :]
        code = tl.load(codes + row[:, None] * columns + first + column[None, :], mask=there, other=0).to(a.dtype)
        way = values_of(code, new_step, centre, stride, new_shift) - values_of(code, step, centre, stride, shift)
        inside = there[None, :, :] & (b < COUNT)[:, None, None]
        tl.store(moved + line[:, :, None] * moved_apart + column[None, None, :], way, mask=inside)
