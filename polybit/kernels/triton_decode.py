"""A nested weight decoded on a GPU: bit planes to a dense matrix of floats, which many tokens are multiplied by.

A program makes 16 rows of some blocks of columns: it interleaves the planes as triton_gemv does, spreads the words to
one number per weight in the order of the columns and applies scales, zero points, ratios and the column scale, in the
very steps of `QWeight.dequantize_even`, so that float32 results are its bits and narrower floats are rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear as dense

from polybit.core.planes import COLUMNS, ROWS, Planes, RatioTable
from polybit.kernels.triton_gemv import INTERPRETED, nibbles, read, select

BLOCKS, WARPS = 16, 4  # column blocks of a program, and its warps
LARGEST = 256 << 20  # bytes of a decoded matrix that are in memory at once


@triton.jit
def codes_of(planes, at, stride, inside, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, INTERPRET: tl.constexpr):
    """Codes of a tile of column blocks and rows [B, 16] as words [B, 16, 8, 4]: column 4 i + t of a block at [i, t].

    A code stands in the low byte, times 2^(4 - WIDTH), above 4 bits times 2^(8 - WIDTH).
    """
    a, b, c, d = read(planes, at, stride, inside, 0, WIDTH)
    h0, h1, h2, h3 = nibbles(a, b, c, d, INTERPRET)
    if WIDTH > 4:
        a, b, c, d = read(planes, at, stride, inside, 4, WIDTH)
        l0, l1, l2, l3 = nibbles(a, b, c, d, INTERPRET)
        p0 = tl.join(select(0xF0F0F0F0, h0 << 4, l0, INTERPRET), select(0xF0F0F0F0, h0, l0 >> 4, INTERPRET))
        p1 = tl.join(select(0xF0F0F0F0, h1 << 4, l1, INTERPRET), select(0xF0F0F0F0, h1, l1 >> 4, INTERPRET))
        p2 = tl.join(select(0xF0F0F0F0, h2 << 4, l2, INTERPRET), select(0xF0F0F0F0, h2, l2 >> 4, INTERPRET))
        p3 = tl.join(select(0xF0F0F0F0, h3 << 4, l3, INTERPRET), select(0xF0F0F0F0, h3, l3 >> 4, INTERPRET))
    else:
        p0 = tl.join(h0 & 0x0F0F0F0F, (h0 >> 4) & 0x0F0F0F0F)
        p1 = tl.join(h1 & 0x0F0F0F0F, (h1 >> 4) & 0x0F0F0F0F)
        p2 = tl.join(h2 & 0x0F0F0F0F, (h2 >> 4) & 0x0F0F0F0F)
        p3 = tl.join(h3 & 0x0F0F0F0F, (h3 >> 4) & 0x0F0F0F0F)
    words = tl.join(tl.join(p0, p2), tl.join(p1, p3)).reshape(BLOCKS, 16, 8)  # from [B, 16, half, i // 2 % 2, i % 2]
    shift = (tl.arange(0, 4) * 8).to(tl.uint32)
    return (words[:, :, :, None] >> shift[None, None, None, :]) & 0xFF


@triton.jit
def decode_rows(
    planes, scale, zero, ratio, column_scale, weight, stride, rows, columns, blocks, groups, first_block,
    gain, fixed_zero, low, high,
    STORED: tl.constexpr, WIDTH: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_RATIO: tl.constexpr, HAS_COLUMN_SCALE: tl.constexpr,
    BLOCKS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """16 rows of BLOCKS blocks of columns. Must be compiled without fusing products and sums.

    planes: uint32 words · zero, ratio: uint8 · weight: [rows, columns], whose first row is the first of block
    `first_block` · GROUP_BLOCKS 0: one group per row.
    """
    row_block = first_block + tl.program_id(0)
    k, r = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS), tl.arange(0, 16)
    inside = (k < blocks)[:, None] & (r >= 0)[None, :]
    UNIT: tl.constexpr = (1 << (4 - WIDTH)) if WIDTH <= 4 else (1 << (8 - WIDTH))
    at = (row_block * blocks + k[:, None]) * 16 + r[None, :]
    codes = codes_of(planes, at, stride, inside, BLOCKS, WIDTH, INTERPRET)
    # 2^23 + a small integer has that integer as its last bits
    value = (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    value -= 0.5 * UNIT * ((1 << WIDTH) - 1)
    group = k // GROUP_BLOCKS if GROUP_BLOCKS else k * 0
    place = row_block * groups + group[:, None]
    step = tl.load(scale + place * 16 + r[None, :], mask=inside, other=0.0).to(tl.float32) * gain
    offset = step * 0 + (0.5 * ((1 << STORED) - 1) - fixed_zero)
    if HAS_ZERO:
        stored = tl.load(zero + place * 16 + r[None, :], mask=inside, other=0)
        offset = 0.5 * ((1 << STORED) - 1) - stored.to(tl.float32)
    factor = tl.zeros((BLOCKS, 16), tl.float32) + low
    if HAS_RATIO:
        pair = tl.load(ratio + place * 8 + (r % 8)[None, :], mask=inside, other=0).to(tl.int32)
        index = tl.where((r < 8)[None, :], pair & 15, pair >> 4).to(tl.float64)
        least, most = tl.full((1, 1), low, tl.float64), tl.full((1, 1), high, tl.float64)
        factor = (least + (most - least) / 15.0 * index).to(tl.float32)  # see planes.ratio_levels
    factor *= (1 << (STORED - WIDTH)) / UNIT
    value = step[:, :, None, None] * (value * factor[:, :, None, None] + offset[:, :, None, None])
    value = value.permute(1, 0, 2, 3).reshape(16, BLOCKS * 32)
    column = tl.program_id(1) * (BLOCKS * 32) + tl.arange(0, BLOCKS * 32)
    if HAS_COLUMN_SCALE:
        value *= tl.load(column_scale + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    row = tl.program_id(0) * 16 + r
    stored_at = weight + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(stored_at, value.to(weight.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


def decode(planes: Planes, width: int, dtype: torch.dtype = torch.float32, first: int = 0, rows: int = 0) -> Tensor:
    """The weight [O, I] as seen at `width` bits, `reference.decode(planes, width).to(dtype)` bit for bit.

    first, rows: only so many rows, the first of them a multiple of 16.
    """
    rows, columns = rows or planes.shape[0], planes.shape[1]
    blocks, stored = -(-columns // COLUMNS), planes.planes
    weight = torch.empty(rows, columns, dtype=dtype, device=stored.device)
    table, none = planes.ratios.get(width, RatioTable(1.0, 1.0)), planes.scale
    decode_rows[(-(-rows // ROWS), -(-blocks // BLOCKS))](
        stored.view(torch.uint32), planes.scale, planes.zero if isinstance(planes.zero, Tensor) else none,
        none if table.index is None else table.index, none if planes.column_scale is None else planes.column_scale,
        weight, stored.stride(0) // 4, rows, columns, blocks, planes.scale.shape[1], first // ROWS,
        planes.gain, 0.0 if isinstance(planes.zero, Tensor) else float(planes.zero), table.low, table.high,
        STORED=planes.bits, WIDTH=width, GROUP_BLOCKS=planes.group_size // COLUMNS,
        HAS_ZERO=isinstance(planes.zero, Tensor), HAS_RATIO=table.index is not None,
        HAS_COLUMN_SCALE=planes.column_scale is not None,
        BLOCKS=BLOCKS, INTERPRET=INTERPRETED, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return weight


def linear(x: Tensor, planes: Planes, width: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x W^T + bias by torch's dense product in `dtype`, the weight decoded so many rows at a time as LARGEST allows."""
    rows, columns = planes.shape
    x_by, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    some = max(LARGEST // (columns * dtype.itemsize) // ROWS * ROWS, ROWS)
    if some >= rows:
        return dense(x_by, decode(planes, width, dtype), bias).to(x.dtype)
    y = x.new_empty(*x.shape[:-1], rows)
    for first in range(0, rows, some):
        stop = min(first + some, rows)
        weight = decode(planes, width, dtype, first, stop - first)
        y[..., first:stop] = dense(x_by, weight, None if bias is None else bias[first:stop])
    return y
