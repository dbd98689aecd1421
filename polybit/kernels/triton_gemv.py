"""A few tokens times a nested weight on a GPU: the stored bytes as they are, 8-bit dot products (dp4a).

Every 32-bit word of a plane block holds one bit of 32 columns of one row, so a thread reads the `width` words of its
row, interleaves them by bitwise selects (as csrc/kernel.h does) and has eight words of four neighbouring codes each,
which meet four int8 activation codes at a time. 16-bit activations are two such digits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polybit.core.planes import COLUMNS, ROWS, Planes, RatioTable
from polybit.kernels.reference import LEVELS, SMALLEST, chunk_of

BLOCKS = 32  # column blocks a program reads at a time
WARPS = 2
MOST_TOKENS = 16  # beyond these a matrix product on the decoded weight is faster
INTERPRETED = triton.knobs.runtime.interpret


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
def nibbles(planes, at, stride, inside, FIRST: tl.constexpr, WIDTH: tl.constexpr, INTERPRET: tl.constexpr):
    """Planes FIRST..FIRST+3 (absent ones zero) as four words of nibbles: word s holds column groups s and s + 4."""
    a = tl.load(planes + FIRST * stride + at, mask=inside, other=0, eviction_policy="evict_first")
    b, c, d = a & 0, a & 0, a & 0
    if WIDTH > FIRST + 1:
        b = tl.load(planes + (FIRST + 1) * stride + at, mask=inside, other=0, eviction_policy="evict_first")
    if WIDTH > FIRST + 2:
        c = tl.load(planes + (FIRST + 2) * stride + at, mask=inside, other=0, eviction_policy="evict_first")
    if WIDTH > FIRST + 3:
        d = tl.load(planes + (FIRST + 3) * stride + at, mask=inside, other=0, eviction_policy="evict_first")
    odd, even = select(0xAAAAAAAA, a, b >> 1, INTERPRET), select(0xAAAAAAAA, a << 1, b, INTERPRET)
    odd_low, even_low = select(0xAAAAAAAA, c, d >> 1, INTERPRET), select(0xAAAAAAAA, c << 1, d, INTERPRET)
    n0 = select(0xCCCCCCCC, even << 2, even_low, INTERPRET)
    n1 = select(0xCCCCCCCC, odd << 2, odd_low, INTERPRET)
    n2 = select(0xCCCCCCCC, even, even_low >> 2, INTERPRET)
    n3 = select(0xCCCCCCCC, odd, odd_low >> 2, INTERPRET)
    return n0, n1, n2, n3


@triton.jit
def both_halves(high, low, x, place: tl.constexpr, inside, total, WIDTH: tl.constexpr, INTERPRET: tl.constexpr):
    """Adds column groups `place` and `place` + 4 of one word of nibbles (two words when codes are wider than 4)."""
    if WIDTH > 4:
        first, second = select(0xF0F0F0F0, high << 4, low, INTERPRET), select(0xF0F0F0F0, high, low >> 4, INTERPRET)
    else:
        first, second = high & 0x0F0F0F0F, (high >> 4) & 0x0F0F0F0F
    spread = (first & 0).to(tl.int32)
    total = dot4(first, tl.load(x + place, mask=inside, other=0)[:, None] + spread, total, INTERPRET)
    return dot4(second, tl.load(x + place + 4, mask=inside, other=0)[:, None] + spread, total, INTERPRET)


@triton.jit
def gemv(
    x, x_scale, x_sum, planes, scale, zero, ratio, bias, y, stride, rows, blocks, groups,
    gain, fixed_zero, low, high,
    STORED: tl.constexpr, WIDTH: tl.constexpr, GROUP_BLOCKS: tl.constexpr, DIGITS: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_RATIO: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCKS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One row block times one token.

    x: int32 words of four codes [tokens, DIGITS, blocks * 8] · x_scale, x_sum: float32, int32 [tokens, blocks] ·
    planes: uint32 words · zero, ratio: uint8 · y: float32 [tokens, rows] · GROUP_BLOCKS 0: one group per row.
    """
    row_block, token = tl.program_id(0), tl.program_id(1)
    r = tl.arange(0, 16)
    UNIT: tl.constexpr = (1 << (4 - WIDTH)) if WIDTH <= 4 else (1 << (8 - WIDTH))
    STEP: tl.constexpr = 1 << (STORED - WIDTH)
    total = tl.zeros((BLOCKS, 16), tl.float32)
    for first in range(0, blocks, BLOCKS):
        k = first + tl.arange(0, BLOCKS)
        inside = k < blocks
        at = (row_block * blocks + k[:, None]) * 16 + r[None, :]
        within = inside[:, None] & (r[None, :] >= 0)
        h0, h1, h2, h3 = nibbles(planes, at, stride, within, 0, WIDTH, INTERPRET)
        l0, l1, l2, l3 = h0, h1, h2, h3
        if WIDTH > 4:
            l0, l1, l2, l3 = nibbles(planes, at, stride, within, 4, WIDTH, INTERPRET)
        dot = tl.zeros((BLOCKS, 16), tl.int32)
        for digit in tl.static_range(DIGITS):
            words = x + (token * DIGITS + digit) * blocks * 8 + k * 8
            part = tl.zeros((BLOCKS, 16), tl.int32)
            part = both_halves(h0, l0, words, 0, inside, part, WIDTH, INTERPRET)
            part = both_halves(h1, l1, words, 1, inside, part, WIDTH, INTERPRET)
            part = both_halves(h2, l2, words, 2, inside, part, WIDTH, INTERPRET)
            part = both_halves(h3, l3, words, 3, inside, part, WIDTH, INTERPRET)
            dot = dot * 256 + part
        sums = tl.load(x_sum + token * blocks + k, mask=inside, other=0)[:, None]
        x_step = tl.load(x_scale + token * blocks + k, mask=inside, other=0.0)[:, None]
        # twice the centred sum is an integer: UNIT * sum of (2 p - (2^WIDTH - 1)) q
        centred = (2 * dot - UNIT * ((1 << WIDTH) - 1) * sums).to(tl.float32) * (0.5 * STEP / UNIT)
        group = k // GROUP_BLOCKS if GROUP_BLOCKS else k * 0
        place = row_block * groups + group[:, None]
        if HAS_RATIO:
            pair = tl.load(ratio + place * 8 + (r % 8)[None, :], mask=within, other=0).to(tl.int32)
            index = tl.where((r < 8)[None, :], pair & 15, pair >> 4).to(tl.float32)
            centred *= low + (high - low) / 15.0 * index
        else:
            centred *= low
        offset = 0.5 * ((1 << STORED) - 1) - fixed_zero
        if HAS_ZERO:
            offset = 0.5 * ((1 << STORED) - 1) - tl.load(zero + place * 16 + r[None, :], mask=within, other=0).to(
                tl.float32
            )
        step = tl.load(scale + place * 16 + r[None, :], mask=within, other=0.0).to(tl.float32)
        total += (centred + offset * sums.to(tl.float32)) * (step * x_step)
    row = row_block * 16 + r
    value = tl.sum(total, 0) * gain
    if HAS_BIAS:
        value += tl.load(bias + row, mask=row < rows, other=0.0)
    tl.store(y + token * rows + row, value, mask=row < rows)


def linear(x: Tensor, planes: Planes, width: int, bias: Tensor | None, activations: str) -> Tensor:
    """`ops.linear` with integer activations for a few tokens on a GPU (or interpreted); shapes as checked there."""
    rows, columns = planes.shape
    blocks = -(-columns // COLUMNS)
    scaled = x.reshape(-1, columns).float()
    if planes.column_scale is not None:
        scaled = scaled * planes.column_scale.float()
    words, x_scale, x_sum = round_words(scaled, chunk_of(planes.group_size), LEVELS[activations], blocks)
    table = planes.ratios.get(width, RatioTable(1.0, 1.0))
    tokens, none = scaled.shape[0], words
    y = torch.empty(tokens, rows, device=x.device)
    gemv[(-(-rows // ROWS), tokens)](
        words, x_scale, x_sum, planes.planes.view(torch.uint32), planes.scale,
        planes.zero if isinstance(planes.zero, Tensor) else none, none if table.index is None else table.index,
        none if bias is None else bias.float(), y,
        planes.planes.stride(0) // 4, rows, blocks, planes.scale.shape[1],
        planes.gain, 0.0 if isinstance(planes.zero, Tensor) else float(planes.zero), table.low, table.high,
        STORED=planes.bits, WIDTH=width, GROUP_BLOCKS=planes.group_size // COLUMNS,
        DIGITS=1 if activations == "int8" else 2,
        HAS_ZERO=isinstance(planes.zero, Tensor), HAS_RATIO=table.index is not None, HAS_BIAS=bias is not None,
        BLOCKS=BLOCKS, INTERPRET=INTERPRETED, num_warps=WARPS,
    )  # fmt: skip
    return y.view(*x.shape[:-1], rows).to(x.dtype)


def round_words(x_TI: Tensor, chunk: int, levels: int, blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Activation codes as words of four int8 digits [T, digits, blocks * 8], scale and code sum per block [T, blocks].

    Rounds as `reference.round_activations` does; a chunk with NaN or infinity gets the scale NaN.
    """
    tokens, columns = x_TI.shape
    padded = torch.nn.functional.pad(x_TI, (0, -columns % chunk)).view(tokens, -1, chunk)
    largest = padded.abs().amax(-1, keepdim=True)
    usable = largest.isfinite() & (largest >= SMALLEST)
    inverse = torch.where(usable, torch.full_like(largest, levels) / largest, 0.0)
    codes = torch.where(usable, padded * inverse, 0.0).round().to(torch.int32).view(tokens, -1)[:, : blocks * COLUMNS]
    scale = torch.where(largest.isfinite(), largest / levels, torch.nan)
    scale = scale.expand(-1, -1, chunk // COLUMNS).reshape(tokens, -1)[:, :blocks].contiguous()
    upper = (codes + 128) >> 8
    digits = torch.stack([codes] if levels < 256 else [upper, codes - 256 * upper], dim=1)
    words = digits.to(torch.int8).contiguous().view(torch.int32)
    return words, scale, codes.view(tokens, blocks, COLUMNS).sum(-1, dtype=torch.int32)
