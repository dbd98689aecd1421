"""A few tokens times a nested weight on a GPU: the stored bytes as they are, 8-bit dot products (dp4a).

Every 32-bit word of a plane block holds one bit of 32 columns of one row, so a thread reads the `width` words of its
row, interleaves them by bitwise selects (as csrc/kernel.h does) and has eight words of four neighbouring codes each,
which meet four int8 activation codes at a time. 16-bit activations are two such digits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from polybit.core.planes import COLUMNS, ROWS, Planes, RatioTable
from polybit.kernels.reference import LEVELS, chunk_of
from polybit.kernels.triton_round import round_blocks, round_words

REGISTERS = 128  # of a thread that rounds too: two programs of 8 warps on a multiprocessor for a few bytes spilled


@triton.jit
def select(MASK: tl.constexpr, a, b, INTERPRET: tl.constexpr):
    """Bits of a where MASK is set, of b elsewhere; written out, because the compiler makes two instructions of it."""
    if INTERPRET:
        return (a & MASK) | (b & (0xFFFFFFFF - MASK))
    elif MASK == 0xAAAAAAAA:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, 0xAAAAAAAA, 0xE4;", "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1
        )
    elif MASK == 0xCCCCCCCC:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, 0xCCCCCCCC, 0xE4;", "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, 0xF0F0F0F0, 0xE4;", "=r,r,r", [a, b], dtype=tl.uint32, is_pure=True, pack=1
        )


INTERPRETED = not isinstance(select, triton.JITFunction)


@triton.jit
def dot4(codes, x, total, INTERPRET: tl.constexpr):
    """total + the dot product of four unsigned codes and four signed activation codes."""
    if INTERPRET:
        for t in tl.static_range(4):
            signed = ((x >> (8 * t)) & 0xFF).to(tl.int32)
            total += ((codes >> (8 * t)) & 0xFF).to(tl.int32) * (signed - ((signed >> 7) << 8))
        return total
    else:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, total], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def read(planes, at, stride, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Words of planes FIRST..FIRST+3; those the width does not have are zero."""
    a = tl.load(planes + FIRST * stride + at, mask=inside, other=0, eviction_policy="evict_first")
    b, c, d = a & 0, a & 0, a & 0
    if WIDTH > FIRST + 1:
        b = tl.load(planes + (FIRST + 1) * stride + at, mask=inside, other=0, eviction_policy="evict_first")
    if WIDTH > FIRST + 2:
        c = tl.load(planes + (FIRST + 2) * stride + at, mask=inside, other=0, eviction_policy="evict_first")
    if WIDTH > FIRST + 3:
        d = tl.load(planes + (FIRST + 3) * stride + at, mask=inside, other=0, eviction_policy="evict_first")
    return a, b, c, d


@triton.jit
def nibbles(a, b, c, d, INTERPRET: tl.constexpr):
    """Four planes as four words of nibbles: word s holds column groups s and s + 4."""
    odd, even = select(0xAAAAAAAA, a, b >> 1, INTERPRET), select(0xAAAAAAAA, a << 1, b, INTERPRET)
    odd_low, even_low = select(0xAAAAAAAA, c, d >> 1, INTERPRET), select(0xAAAAAAAA, c << 1, d, INTERPRET)
    n0 = select(0xCCCCCCCC, even << 2, even_low, INTERPRET)
    n1 = select(0xCCCCCCCC, odd << 2, odd_low, INTERPRET)
    n2 = select(0xCCCCCCCC, even, even_low >> 2, INTERPRET)
    n3 = select(0xCCCCCCCC, odd, odd_low >> 2, INTERPRET)
    return n0, n1, n2, n3


@triton.jit
def eight_words(x, far, inside):
    """Activations of the eight column groups of a block, `far` apart."""
    x0, x1 = tl.load(x, mask=inside, other=0), tl.load(x + far, mask=inside, other=0)
    x2, x3 = tl.load(x + 2 * far, mask=inside, other=0), tl.load(x + 3 * far, mask=inside, other=0)
    x4, x5 = tl.load(x + 4 * far, mask=inside, other=0), tl.load(x + 5 * far, mask=inside, other=0)
    x6, x7 = tl.load(x + 6 * far, mask=inside, other=0), tl.load(x + 7 * far, mask=inside, other=0)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def two_groups(total, high, low, x, x_far, WIDTH: tl.constexpr, INTERPRET: tl.constexpr):
    """Adds a column group and the fourth after it: one word of nibbles, or two where codes are wider than 4 bits."""
    if WIDTH > 4:
        first, second = select(0xF0F0F0F0, high << 4, low, INTERPRET), select(0xF0F0F0F0, high, low >> 4, INTERPRET)
    else:
        first, second = high & 0x0F0F0F0F, (high >> 4) & 0x0F0F0F0F
    spread = (first & 0).to(tl.int32)
    total = dot4(first, x[:, None] + spread, total, INTERPRET)
    return dot4(second, x_far[:, None] + spread, total, INTERPRET)


@triton.jit
def add_words(
    total, x0, x1, x2, x3, x4, x5, x6, x7, y0, y1, y2, y3, y4, y5, y6, y7, sums, x_step,
    h0, h1, h2, h3, l0, l1, l2, l3, factor, offset, step,
    WIDTH: tl.constexpr, DIGITS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """total + what some column blocks give one token, whose rounded activations are words [blocks] of column groups."""
    UNIT: tl.constexpr = (1 << (4 - WIDTH)) if WIDTH <= 4 else (1 << (8 - WIDTH))
    dot = two_groups((h0 & 0).to(tl.int32), h0, l0, x0, x4, WIDTH, INTERPRET)
    dot = two_groups(dot, h1, l1, x1, x5, WIDTH, INTERPRET)
    dot = two_groups(dot, h2, l2, x2, x6, WIDTH, INTERPRET)
    dot = two_groups(dot, h3, l3, x3, x7, WIDTH, INTERPRET)
    if DIGITS == 2:
        dot = two_groups(dot * 256, h0, l0, y0, y4, WIDTH, INTERPRET)
        dot = two_groups(dot, h1, l1, y1, y5, WIDTH, INTERPRET)
        dot = two_groups(dot, h2, l2, y2, y6, WIDTH, INTERPRET)
        dot = two_groups(dot, h3, l3, y3, y7, WIDTH, INTERPRET)
    # twice the centred sum is an integer: UNIT * sum of (2 p - (2^WIDTH - 1)) q
    centred = (2 * dot - UNIT * ((1 << WIDTH) - 1) * sums[:, None]).to(tl.float32)
    return total + (centred * factor + offset * sums.to(tl.float32)[:, None]) * (step * x_step[:, None])


@triton.jit
def add_token(
    total, x, x_scale, x_sum, token, blocks, k, inside, h0, h1, h2, h3, l0, l1, l2, l3, factor, offset, step,
    WIDTH: tl.constexpr, DIGITS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`add_words` of a token rounded before. Everything is loaded before anything is used."""
    words = x + token * DIGITS * 8 * blocks + k
    x0, x1, x2, x3, x4, x5, x6, x7 = eight_words(words, blocks, inside)
    y0, y1, y2, y3, y4, y5, y6, y7 = x0, x1, x2, x3, x4, x5, x6, x7
    if DIGITS == 2:
        y0, y1, y2, y3, y4, y5, y6, y7 = eight_words(words + 8 * blocks, blocks, inside)
    sums = tl.load(x_sum + token * blocks + k, mask=inside, other=0)
    x_step = tl.load(x_scale + token * blocks + k, mask=inside, other=0.0)
    return add_words(total, x0, x1, x2, x3, x4, x5, x6, x7, y0, y1, y2, y3, y4, y5, y6, y7, sums, x_step,
                     h0, h1, h2, h3, l0, l1, l2, l3, factor, offset, step, WIDTH, DIGITS, INTERPRET)  # fmt: skip


@triton.jit
def store_token(y, bias, total, token, tokens, row, rows, gain, HAS_BIAS: tl.constexpr):
    """Sums one token's parts, adds the bias and writes in y's type."""
    value = tl.sum(total, 0) * gain
    if HAS_BIAS:
        value += tl.load(bias + row, mask=row < rows, other=0.0).to(tl.float32)
    tl.store(y + token * rows + row, value.to(y.dtype.element_ty), mask=(row < rows) & (token + row * 0 < tokens))


@triton.jit
def read_all(planes, at, stride, inside, WIDTH: tl.constexpr):
    """Words of the four upper planes and of the four lower ones; the upper again where there are no lower ones."""
    p0, p1, p2, p3 = read(planes, at, stride, inside, 0, WIDTH)
    p4, p5, p6, p7 = p0, p1, p2, p3
    if WIDTH > 4:
        p4, p5, p6, p7 = read(planes, at, stride, inside, 4, WIDTH)
    return p0, p1, p2, p3, p4, p5, p6, p7


@triton.jit
def nibbles_all(p0, p1, p2, p3, p4, p5, p6, p7, WIDTH: tl.constexpr, INTERPRET: tl.constexpr):
    """Codes of what `read_all` read, upper and lower halves."""
    h0, h1, h2, h3 = nibbles(p0, p1, p2, p3, INTERPRET)
    l0, l1, l2, l3 = h0, h1, h2, h3
    if WIDTH > 4:
        l0, l1, l2, l3 = nibbles(p4, p5, p6, p7, INTERPRET)
    return h0, h1, h2, h3, l0, l1, l2, l3


@triton.jit
def meaning(
    scale, zero, ratio, place, r, within, fixed_zero, low, high,
    STORED: tl.constexpr, WIDTH: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_RATIO: tl.constexpr,
):  # fmt: skip
    """What the codes of a tile mean: step, offset and factor of every column block and row [B, 16]; place: [B, 1]."""
    UNIT: tl.constexpr = (1 << (4 - WIDTH)) if WIDTH <= 4 else (1 << (8 - WIDTH))
    STEP: tl.constexpr = 1 << (STORED - WIDTH)
    step = tl.load(scale + place * 16 + r[None, :], mask=within, other=0.0).to(tl.float32)
    offset = step * 0 + (0.5 * ((1 << STORED) - 1) - fixed_zero)
    if HAS_ZERO:
        stored = tl.load(zero + place * 16 + r[None, :], mask=within, other=0)
        offset = 0.5 * ((1 << STORED) - 1) - stored.to(tl.float32)
    factor = step * 0 + low
    if HAS_RATIO:
        pair = tl.load(ratio + place * 8 + (r % 8)[None, :], mask=within, other=0).to(tl.int32)
        index = tl.where((r < 8)[None, :], pair & 15, pair >> 4).to(tl.float32)
        factor = low + (high - low) / 15.0 * index
    factor *= 0.5 * STEP / UNIT
    return step, offset, factor


@triton.jit(do_not_specialize=["tokens"])  # another number of tokens must not mean compiling again
def gemv(
    x, x_scale, x_sum, planes, scale, zero, ratio, bias, y, tokens, stride, rows, columns, blocks, groups,
    gain, fixed_zero, low, high,
    STORED: tl.constexpr, WIDTH: tl.constexpr, GROUP_BLOCKS: tl.constexpr, CHUNK_BLOCKS: tl.constexpr,
    DIGITS: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_RATIO: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_COLUMN_SCALE: tl.constexpr, ROUND: tl.constexpr, TOKENS: tl.constexpr, BLOCKS: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One row block times TOKENS tokens (1, 2 or 4), for which it is read and interleaved once.

    x: int32 words of four codes [tokens, DIGITS, 8, blocks] · x_scale, x_sum: float32, int32 [tokens, blocks]; or with
    ROUND one token's float input [columns], x_scale its column scale and x_sum nothing: every program rounds it all ·
    planes: uint32 words · zero, ratio: uint8 · y: [tokens, rows] · GROUP_BLOCKS 0: one group per row.
    """
    row_block, token = tl.program_id(0), tl.program_id(1) * TOKENS
    token1, token2, token3 = token + 1, token + 2, token + 3
    # tokens that are not there are computed from the last one and not stored
    last = tokens - 1
    real1, real2, real3 = tl.minimum(token1, last), tl.minimum(token2, last), tl.minimum(token3, last)
    r = tl.arange(0, 16)
    total0 = tl.zeros((BLOCKS, 16), tl.float32)
    total1, total2, total3 = total0, total0, total0
    for first in range(0, blocks, BLOCKS):
        k = first + tl.arange(0, BLOCKS)
        inside = k < blocks
        at = (row_block * blocks + k[:, None]) * 16 + r[None, :]
        within = inside[:, None] & (r[None, :] >= 0)
        p0, p1, p2, p3, p4, p5, p6, p7 = read_all(planes, at, stride, within, WIDTH)
        group = k // GROUP_BLOCKS if GROUP_BLOCKS else k * 0
        step, offset, factor = meaning(
            scale, zero, ratio, row_block * groups + group[:, None], r, within, fixed_zero, low, high,
            STORED, WIDTH, HAS_ZERO, HAS_RATIO,
        )  # fmt: skip
        h0, h1, h2, h3, l0, l1, l2, l3 = nibbles_all(p0, p1, p2, p3, p4, p5, p6, p7, WIDTH, INTERPRET)
        if ROUND:
            x0, x1, x2, x3, x4, x5, x6, x7, y0, y1, y2, y3, y4, y5, y6, y7, sums, x_step = round_blocks(
                x, x_scale, k, columns, 127 if DIGITS == 1 else 32512, DIGITS, CHUNK_BLOCKS, BLOCKS, HAS_COLUMN_SCALE
            )
            total0 = add_words(
                total0, x0, x1, x2, x3, x4, x5, x6, x7, y0, y1, y2, y3, y4, y5, y6, y7, sums, x_step,
                h0, h1, h2, h3, l0, l1, l2, l3, factor, offset, step, WIDTH, DIGITS, INTERPRET,
            )  # fmt: skip
        else:
            total0 = add_token(total0, x, x_scale, x_sum, token, blocks, k, inside, h0, h1, h2, h3, l0, l1, l2, l3,
                               factor, offset, step, WIDTH, DIGITS, INTERPRET)  # fmt: skip
        if TOKENS > 1:
            total1 = add_token(total1, x, x_scale, x_sum, real1, blocks, k, inside, h0, h1, h2, h3, l0, l1, l2, l3,
                               factor, offset, step, WIDTH, DIGITS, INTERPRET)  # fmt: skip
        if TOKENS > 2:
            total2 = add_token(total2, x, x_scale, x_sum, real2, blocks, k, inside, h0, h1, h2, h3, l0, l1, l2, l3,
                               factor, offset, step, WIDTH, DIGITS, INTERPRET)  # fmt: skip
            total3 = add_token(total3, x, x_scale, x_sum, real3, blocks, k, inside, h0, h1, h2, h3, l0, l1, l2, l3,
                               factor, offset, step, WIDTH, DIGITS, INTERPRET)  # fmt: skip
    row = row_block * 16 + r
    store_token(y, bias, total0, token, tokens, row, rows, gain, HAS_BIAS)
    if TOKENS > 1:
        store_token(y, bias, total1, token1, tokens, row, rows, gain, HAS_BIAS)
    if TOKENS > 2:
        store_token(y, bias, total2, token2, tokens, row, rows, gain, HAS_BIAS)
        store_token(y, bias, total3, token3, tokens, row, rows, gain, HAS_BIAS)


def tile_of(blocks: int, tokens: int) -> tuple[int, int, int]:
    """(tokens, column blocks, warps) of a program, for a row of `blocks` column blocks.

    A row block of 4096 columns is read at once by 8 warps: the 256 programs of 4096 rows then have all of the weight on
    its way together, which a GPU's bandwidth needs. With 4 tokens half as many columns leave registers for two programs
    on a multiprocessor.
    """
    if tokens > 2:
        return (4, 32, 4) if blocks <= 32 else (4, 64, 8)
    wide = next((size for size in (32, 64) if blocks <= size), 128)
    return tokens, wide, wide // 16


def linear(
    x: Tensor,
    planes: Planes,
    width: int,
    bias: Tensor | None,
    arithmetic: str,
    tile: tuple[int, int, int] | None = None,
    fuse: bool = True,
) -> Tensor:
    """`ops.linear` with integer arithmetic for a few tokens on a GPU (or interpreted); shapes as checked there.

    tile: in place of what `tile_of` chooses. fuse: one token is rounded in the kernel that multiplies it.
    """
    tokens = x.numel() // x.shape[-1]
    y = x.new_empty(*x.shape[:-1], planes.shape[0])
    bias = bias if bias is None else bias.contiguous()
    tile = tile or tile_of(-(-x.shape[-1] // COLUMNS), tokens)
    if tokens == 1 and fuse:
        scale = x if planes.column_scale is None else planes.column_scale
        launch(x.contiguous(), scale, x, planes, width, bias, y, 1, arithmetic, tile, fuse)
    else:
        levels, chunk = LEVELS[arithmetic], chunk_of(planes.group_size)
        rounded = round_words(x.reshape(tokens, -1), planes.column_scale, chunk, levels)
        launch(*rounded, planes, width, bias, y, tokens, arithmetic, tile, False)
    return y


def launch(
    x: Tensor, x_scale: Tensor, x_sum: Tensor, planes: Planes, width: int, bias: Tensor | None, y: Tensor,
    tokens: int, arithmetic: str, tile: tuple[int, int, int], fuse: bool,
) -> tuple[Any, tuple[int, int, int], list[Any]]:  # fmt: skip
    """Starts the kernel; returns it as it was compiled, its grid and its arguments, with which it can start again."""
    rows, columns = planes.shape
    table = planes.ratios.get(width, RatioTable(1.0, 1.0))
    zero, fixed = (planes.zero, 0.0) if isinstance(planes.zero, Tensor) else (x, float(planes.zero))
    at_once, wide, warps = tile
    grid = (-(-rows // ROWS), -(-tokens // at_once), 1)
    arguments = [
        x, x_scale, x_sum, planes.planes.view(torch.uint32), planes.scale, zero,
        x if table.index is None else table.index, x if bias is None else bias, y,
        tokens, planes.planes.stride(0) // 4, rows, columns, -(-columns // COLUMNS), planes.scale.shape[1],
        planes.gain, fixed, table.low, table.high,
        planes.bits, width, planes.group_size // COLUMNS, chunk_of(planes.group_size) // COLUMNS,
        1 if arithmetic == "int8" else 2, isinstance(planes.zero, Tensor), table.index is not None, bias is not None,
        planes.column_scale is not None, fuse, at_once, wide, INTERPRETED,
    ]  # fmt: skip
    most = REGISTERS if fuse else None
    return gemv[grid](*arguments, num_warps=warps, maxnreg=most, enable_fp_fusion=False), grid, arguments
