"""Many tokens times a nested weight on a GPU: the stored bytes as they are, 8-bit tensor cores.

A program makes a tile of tokens and rows. For every chunk of columns that shares an activation scale it interleaves the
planes as triton_gemv does, spreads the words to one signed byte per weight in the order of the columns, and lets one
integer matrix product per activation digit do the rest; scales, zero points and ratios are applied to its sums. The
result is the integer arithmetic of `reference.linear`, exact up to the order of the float additions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polybit.core.planes import COLUMNS, ROWS, Planes, RatioTable
from polybit.kernels.reference import LEVELS, chunk_of
from polybit.kernels.triton_gemv import INTERPRETED, nibbles, read, select
from polybit.kernels.triton_round import round_words

TILES = {32: (64, 4), 64: (64, 4), 128: (64, 8)}  # tokens of a tile -> (rows of a tile, warps)


@triton.jit
def spread(planes, at, stride, inside, WIDTH: tl.constexpr, INTERPRET: tl.constexpr):
    """Codes of a tile of rows and column blocks [N, B] as bytes int8 [N, B, 8, 4]: column 4 i + t of a block at [i, t].

    Up to 4 bits a byte is the code times 2^(4 - WIDTH); above, it is the code times 2^(8 - WIDTH), less 128.
    """
    a, b, c, d = read(planes, at, stride, inside, 0, WIDTH)
    h0, h1, h2, h3 = nibbles(a, b, c, d, INTERPRET)
    shift = (tl.arange(0, 4) * 8).to(tl.uint32)
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
    words = tl.join(tl.join(p0, p2), tl.join(p1, p3))  # [N, B, half, i // 2 % 2, i % 2]
    if WIDTH > 4:
        words = words ^ 0x80808080
    words = words.reshape(at.shape[0], at.shape[1], 8)
    return ((words[:, :, :, None] >> shift[None, None, None, :]) & 0xFF).to(tl.uint8).to(tl.int8, bitcast=True)


@triton.jit(do_not_specialize=["tokens"])
def gemm(
    x, x_scale, x_sum, planes, scale, zero, ratio, bias, y, tokens, stride, rows, row_blocks, blocks, groups, chunks,
    gain, fixed_zero, low, high,
    STORED: tl.constexpr, WIDTH: tl.constexpr, CHUNK_BLOCKS: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
    DIGITS: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_RATIO: tl.constexpr, HAS_BIAS: tl.constexpr,
    TOKENS: tl.constexpr, WIDE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of TOKENS tokens and WIDE rows.

    x: int8 codes [tokens, DIGITS, blocks * 32] · x_scale, x_sum: float32, int32 [tokens, chunks] · planes: uint32 words
    · zero, ratio: uint8 · y: [tokens, rows] · GROUP_BLOCKS 0: one group per row.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    row_block, r = row // 16, row % 16
    real, there = token < tokens, row_block < row_blocks
    HALF: tl.constexpr = 128 if WIDTH > 4 else 0
    UNIT: tl.constexpr = (1 << (4 - WIDTH)) if WIDTH <= 4 else (1 << (8 - WIDTH))
    STEP: tl.constexpr = 1 << (STORED - WIDTH)
    SIZE: tl.constexpr = CHUNK_BLOCKS * 32
    total = tl.zeros((TOKENS, WIDE), tl.float32)
    for chunk in range(chunks):
        k = chunk * CHUNK_BLOCKS + tl.arange(0, CHUNK_BLOCKS)
        at = (row_block[:, None] * blocks + k[None, :]) * 16 + r[:, None]
        codes = spread(planes, at, stride, there[:, None] & (k < blocks)[None, :], WIDTH, INTERPRET)
        codes = tl.trans(codes.reshape(WIDE, SIZE))
        column = chunk * SIZE + tl.arange(0, SIZE)
        inside = real[:, None] & (column < blocks * 32)[None, :]
        dot = tl.zeros((TOKENS, WIDE), tl.int32)
        for digit in tl.static_range(DIGITS):
            place = (token[:, None] * DIGITS + digit).to(tl.int64) * (blocks * 32) + column[None, :]
            part = tl.dot(tl.load(x + place, mask=inside, other=0), codes, out_dtype=tl.int32)
            dot = part if digit == 0 else dot * 256 + part
        x_place = token.to(tl.int64) * chunks + chunk
        sums = tl.load(x_sum + x_place, mask=real, other=0)
        x_step = tl.load(x_scale + x_place, mask=real, other=0.0)
        # twice the centred sum is an integer, see triton_gemv
        centre = (2 * HALF - UNIT * ((1 << WIDTH) - 1)) * sums
        value = (2 * dot + centre[:, None]).to(tl.float32) * (0.5 * STEP / UNIT)
        group = (chunk * CHUNK_BLOCKS) // GROUP_BLOCKS if GROUP_BLOCKS else 0
        entry = row_block * groups + group
        if HAS_RATIO:
            pair = tl.load(ratio + entry * 8 + r % 8, mask=there, other=0).to(tl.int32)
            index = tl.where(r < 8, pair & 15, pair >> 4).to(tl.float32)
            value *= (low + (high - low) / 15.0 * index)[None, :]
        else:
            value *= low
        if HAS_ZERO:
            stored_zero = tl.load(zero + entry * 16 + r, mask=there, other=0).to(tl.float32)
            offset = 0.5 * ((1 << STORED) - 1) - stored_zero
        else:
            offset = tl.zeros((WIDE,), tl.float32) + (0.5 * ((1 << STORED) - 1) - fixed_zero)
        value += sums.to(tl.float32)[:, None] * offset[None, :]
        step = tl.load(scale + entry * 16 + r, mask=there, other=0.0).to(tl.float32)
        total += value * step[None, :] * x_step[:, None]
    total *= gain
    if HAS_BIAS:
        total += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)[None, :]
    place = token.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(y + place, total.to(y.dtype.element_ty), mask=real[:, None] & (row < rows)[None, :])


def linear(x: Tensor, planes: Planes, width: int, bias: Tensor | None, activations: str) -> Tensor:
    """`ops.linear` with integer activations for many tokens on a GPU (or interpreted); shapes as checked there."""
    rows, columns = planes.shape
    blocks, row_blocks, tokens = -(-columns // COLUMNS), -(-rows // ROWS), x.numel() // columns
    chunk = chunk_of(planes.group_size)
    words, x_scale, x_sum = round_words(
        x.reshape(-1, columns), planes.column_scale, chunk, LEVELS[activations], by_block=False
    )
    chunks = x_scale.shape[1]
    table = planes.ratios.get(width, RatioTable(1.0, 1.0))
    none = words
    most = next((size for size in TILES if tokens <= size), max(TILES))
    wide, warps = TILES[most]
    y = x.new_empty(tokens, rows)
    gemm[(-(-tokens // most), -(-rows // wide))](
        words.view(torch.int8), x_scale, x_sum, planes.planes.view(torch.uint32), planes.scale,
        planes.zero if isinstance(planes.zero, Tensor) else none, none if table.index is None else table.index,
        none if bias is None else bias.contiguous(), y,
        tokens, planes.planes.stride(0) // 4, rows, row_blocks, blocks, planes.scale.shape[1], chunks,
        planes.gain, 0.0 if isinstance(planes.zero, Tensor) else float(planes.zero), table.low, table.high,
        STORED=planes.bits, WIDTH=width, CHUNK_BLOCKS=chunk // COLUMNS, GROUP_BLOCKS=planes.group_size // COLUMNS,
        DIGITS=1 if activations == "int8" else 2,
        HAS_ZERO=isinstance(planes.zero, Tensor), HAS_RATIO=table.index is not None, HAS_BIAS=bias is not None,
        TOKENS=most, WIDE=wide, INTERPRET=INTERPRETED, num_warps=warps,
    )  # fmt: skip
    return y.view(*x.shape[:-1], rows)
