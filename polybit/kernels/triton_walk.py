"""The walks over columns on a GPU: one block of columns of some rows on chip, every width at once.

A program holds a tile [widths, rows, columns] of what is walked over (compensated weights, or the gradient) in
registers and goes through its columns one after another; what lies beyond the block is a dense product afterwards
(`device_search`). Widths are padded to a power of two with such as cost nothing. Suffix B: widths, R: rows of a
program, C: columns of a block. What is done is said by quant.descent.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def meaning(
    scale, zero, ratio, tops, widths, row, rows, group, groups, plane,
    COUNT: tl.constexpr, WIDTHS: tl.constexpr,
):  # fmt: skip
    """What codes of one group mean: step, pull λ step², prefix centre and stride [B, R] or [B, 1], offset [R], largest
    code. widths: emphasis, stride, centre of each width, [3, WIDTHS]."""
    b = tl.arange(0, WIDTHS)
    at, within = row * groups + group, row < rows
    top = tl.load(tops + group)
    emphasis, stride = tl.load(widths + b)[:, None], tl.load(widths + WIDTHS + b)[:, None]
    centre = tl.load(widths + 2 * WIDTHS + b)[:, None]
    if COUNT == 1:
        centre = centre * 0 + top / 2  # groups may differ in width
    size = tl.load(scale + at, mask=within, other=1.0)
    offset = size * (top / 2 - tl.load(zero + at, mask=within, other=0.0))
    known = within[None, :] & (b < COUNT)[:, None]
    step = size[None, :] * tl.load(ratio + b[:, None] * plane + at[None, :], mask=known, other=1.0) * stride
    return step, emphasis * step * step, centre, stride, offset, top


@triton.jit
def nearest(place, low, high):
    """The package's rounding (ties upwards), kept between two integers."""
    return tl.minimum(tl.maximum(tl.floor(place + 0.5), low), high)


INTERPRETED = not isinstance(nearest, triton.JITFunction)


@triton.jit
def choose(
    target, step, pull, centre, stride, offset, low, high,
    COUNT: tl.constexpr, WIDTHS: tl.constexpr, PARENTS: tl.constexpr, CHILDREN: tl.constexpr,
):  # fmt: skip
    """Codes [R] with the least Σ_b λ_b (w_b(u) - target_b)² from low to high; target: [B, R].

    For every prefix of the width before the widest (PARENTS) the best of its CHILDREN has a closed form.
    """
    x = (target - offset[None, :]) / step
    if COUNT == 1:
        return nearest(tl.sum(x + centre, 0), low, high)
    first = (tl.arange(0, WIDTHS) == 0)[:, None]
    place, weight = tl.sum(tl.where(first, x + centre, 0.0), 0), tl.sum(tl.where(first, pull, 0.0), 0)
    parent = tl.arange(0, PARENTS)
    lowest = (parent * CHILDREN).to(target.dtype)
    level = tl.floor(lowest[None, None, :] / stride[:, :, None]) - centre[:, :, None]
    miss = level - x[:, :, None]
    cost = tl.sum(tl.where(first, 0.0, pull)[:, :, None] * miss * miss, 0)
    near = nearest(place, low, high)
    code = tl.minimum(tl.maximum(near[:, None], lowest[None, :]), lowest[None, :] + (CHILDREN - 1))
    short = code - place[:, None]
    cost += weight[:, None] * short * short
    cost = tl.where((code < low[:, None]) | (code > high[:, None]), float("inf"), cost)
    best = (tl.argmin(cost, 1) * CHILDREN).to(target.dtype)
    return tl.minimum(tl.maximum(near, best), best + (CHILDREN - 1))


@triton.jit
def value_of(code, step, centre, stride, offset):
    """Values [B, R] of codes [R]."""
    return (tl.floor(code[None, :] / stride) - centre) * step + offset[None, :]


@triton.jit
def values_of(code, step, centre, stride, offset):
    """Values [B, R, C] of a tile of codes [R, C]."""
    prefix = tl.floor(code[None, :, :] / stride[:, :, None]) - centre[:, :, None]
    return prefix * step[:, :, None] + offset[None, :, None]


@triton.jit
def compensate_block(
    working, errors, codes, loss, factor, scale, zero, ratio, tops, widths, group_of,
    rows, columns, first, count, groups, plane, apart,
    COUNT: tl.constexpr, WIDTHS: tl.constexpr, PARENTS: tl.constexpr, CHILDREN: tl.constexpr,
    ONE_GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Error compensation of `count` columns from `first` on.

    working: [B, rows, columns], as columns before the block left it · errors: [B, rows, `apart`], its first column this
    block's · codes: uint8 [rows, columns] · loss: [B, rows], added to · factor: [columns, columns] · group_of: group of
    every column, int32.
    """
    row, b, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTHS), tl.arange(0, COLUMNS)
    line = b[:, None] * rows + row[None, :]
    known = (row < rows)[None, :] & (b < COUNT)[:, None]
    inside = known[:, :, None] & (c < count)[None, None, :]
    tile = tl.load(working + line[:, :, None] * columns + first + c[None, None, :], mask=inside, other=0.0)
    missed, chosen = tile * 0, tl.zeros((ROWS, COLUMNS), tl.int32)
    step, pull, centre, stride, offset, top = meaning(
        scale, zero, ratio, tops, widths, row, rows, tl.load(group_of + first), groups, plane, COUNT, WIDTHS
    )
    for j in range(0, count):
        if not ONE_GROUP:
            step, pull, centre, stride, offset, top = meaning(
                scale, zero, ratio, tops, widths, row, rows, tl.load(group_of + first + j), groups, plane, COUNT, WIDTHS
            )
        line_of = tl.load(factor + (first + j) * columns + first + c, mask=c < count, other=0.0)  # 0 before column j
        here = c == j
        target = tl.sum(tl.where(here[None, None, :], tile, 0.0), 2)
        none = offset * 0
        code = choose(target, step, pull, centre, stride, offset, none, none + top, COUNT, WIDTHS, PARENTS, CHILDREN)
        error = (target - value_of(code, step, centre, stride, offset)) / tl.sum(tl.where(here, line_of, 0.0), 0)
        tile -= error[:, :, None] * line_of[None, None, :]
        missed = tl.where(here[None, None, :], error[:, :, None], missed)
        chosen = tl.where(here[None, :], code.to(tl.int32)[:, None], chosen)
    tl.store(errors + line[:, :, None] * apart + c[None, None, :], missed, mask=inside)
    spent = tl.sum(tl.where(inside, missed * missed, 0.0), 2)
    tl.store(loss + line, tl.load(loss + line, mask=known, other=0.0) + spent, mask=known)
    place = codes + row[:, None] * columns + first + c[None, :]
    tl.store(place, chosen.to(tl.uint8), mask=(row < rows)[:, None] & (c < count)[None, :])


@triton.jit
def descend_block(
    codes, slope, moved, total, hessian, scale, zero, ratio, tops, widths,
    rows, columns, first, count, group, groups, plane, slope_apart, total_apart, cell,
    COUNT: tl.constexpr, WIDTHS: tl.constexpr, PARENTS: tl.constexpr, CHILDREN: tl.constexpr,
    HELD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One exact coordinate step for each of `count` columns of a group from `first` on.

    codes: uint8 [rows, columns], rewritten · slope: gradient of the block, [B, rows, `slope_apart`] · moved: [B, rows,
    count], out · total: [B, rows, `total_apart`], added to · cell: codes that share the bits held (HELD).
    """
    row, b, c = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTHS), tl.arange(0, COLUMNS)
    line = b[:, None] * rows + row[None, :]
    inside = ((row < rows)[None, :] & (b < COUNT)[:, None])[:, :, None] & (c < count)[None, None, :]
    tile = tl.load(slope + line[:, :, None] * slope_apart + c[None, None, :], mask=inside, other=0.0)
    place = codes + row[:, None] * columns + first + c[None, :]
    there = (row < rows)[:, None] & (c < count)[None, :]
    before = tl.load(place, mask=there, other=0).to(tile.dtype)
    after = before
    step, pull, centre, stride, offset, top = meaning(
        scale, zero, ratio, tops, widths, row, rows, group, groups, plane, COUNT, WIDTHS
    )
    for j in range(0, count):
        line_of = tl.load(hessian + (first + j) * columns + first + c, mask=c < count, other=0.0)
        here = c == j
        code = tl.sum(tl.where(here[None, :], before, 0.0), 1)
        now = value_of(code, step, centre, stride, offset)
        pulled = tl.sum(tl.where(here[None, None, :], tile, 0.0), 2)
        target = now - pulled / tl.sum(tl.where(here, line_of, 0.0), 0)
        low, high = offset * 0, offset * 0 + top
        if HELD:
            low = tl.floor(code / cell) * cell
            high = low + (cell - 1)
        code = choose(target, step, pull, centre, stride, offset, low, high, COUNT, WIDTHS, PARENTS, CHILDREN)
        tile += (value_of(code, step, centre, stride, offset) - now)[:, :, None] * line_of[None, None, :]
        after = tl.where(here[None, :], code[:, None], after)
    tl.store(place, after.to(tl.int32).to(tl.uint8), mask=there)
    way = values_of(after, step, centre, stride, offset) - values_of(before, step, centre, stride, offset)
    tl.store(moved + line[:, :, None] * count + c[None, None, :], way, mask=inside)
    sums = total + line[:, :, None] * total_apart + c[None, None, :]
    tl.store(sums, tl.load(sums, mask=inside, other=0.0) + way, mask=inside)
