"""Rounding of activations on a GPU: codes as words of four int8 digits, their scales and sums; several tokens in a
launch of their own (`round_words`), one in the kernel that multiplies it (`round_blocks`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polybit.core.planes import COLUMNS
from polybit.kernels.reference import SMALLEST

TILE = 32  # column blocks of one program
WARPS = 1
TINY = tl.constexpr(SMALLEST)
MAGIC = tl.constexpr(1.5 * 2**23)  # float32 numbers of this size are integers: adding it rounds, ties to even


@triton.jit
def four(x, column_scale, k, columns, I: tl.constexpr, HAS_COLUMN_SCALE: tl.constexpr):
    """Columns 4 I .. 4 I + 3 of blocks k, float32 [B, 4], and their magnitudes as integers: these are ordered like the
    numbers, infinity and then NaN last."""
    column = k[:, None] * 32 + (4 * I + tl.arange(0, 4))[None, :]
    value = tl.load(x + column, mask=column < columns, other=0.0).to(tl.float32)
    if HAS_COLUMN_SCALE:
        value *= tl.load(column_scale + column, mask=column < columns, other=0.0).to(tl.float32)
    return value, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def pack(value, usable, inverse, DIGITS: tl.constexpr):
    """Codes of [B, 4] values as words of four int8, one or two digits, and the codes."""
    codes = (tl.where(usable[:, None], value, 0.0) * inverse[:, None] + MAGIC - MAGIC).to(tl.int32)
    shift = (tl.arange(0, 4) * 8)[None, :]
    if DIGITS == 1:
        word = tl.sum((codes & 255) << shift, 1)
        return word, word, codes
    first = (codes + 128) >> 8
    return tl.sum((first & 255) << shift, 1), tl.sum(((codes - 256 * first) & 255) << shift, 1), codes


@triton.jit
def round_blocks(
    x, column_scale, k, columns,
    LEVELS: tl.constexpr, DIGITS: tl.constexpr, CHUNK_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
    HAS_COLUMN_SCALE: tl.constexpr,
):  # fmt: skip
    """BLOCKS neighbouring blocks of columns of one token, whole chunks: words of their eight column groups (upper
    digits, then lower ones; the same twice where there is one digit), sums of codes, scales. Must be compiled without
    fusing products and sums."""
    v0, m0 = four(x, column_scale, k, columns, 0, HAS_COLUMN_SCALE)
    v1, m1 = four(x, column_scale, k, columns, 1, HAS_COLUMN_SCALE)
    v2, m2 = four(x, column_scale, k, columns, 2, HAS_COLUMN_SCALE)
    v3, m3 = four(x, column_scale, k, columns, 3, HAS_COLUMN_SCALE)
    v4, m4 = four(x, column_scale, k, columns, 4, HAS_COLUMN_SCALE)
    v5, m5 = four(x, column_scale, k, columns, 5, HAS_COLUMN_SCALE)
    v6, m6 = four(x, column_scale, k, columns, 6, HAS_COLUMN_SCALE)
    v7, m7 = four(x, column_scale, k, columns, 7, HAS_COLUMN_SCALE)
    size = tl.maximum(tl.maximum(tl.maximum(m0, m1), tl.maximum(m2, m3)),
                      tl.maximum(tl.maximum(m4, m5), tl.maximum(m6, m7)))  # fmt: skip
    size = tl.max(tl.max(size, 1).reshape(BLOCKS // CHUNK_BLOCKS, CHUNK_BLOCKS), 1)
    size = (size[:, None] + tl.zeros((BLOCKS // CHUNK_BLOCKS, CHUNK_BLOCKS), tl.int32)).reshape(BLOCKS)
    finite, largest = size < 0x7F800000, size.to(tl.float32, bitcast=True)
    usable = finite & (largest >= TINY)
    levels = tl.full((BLOCKS,), LEVELS, tl.float32)
    inverse = tl.where(usable, tl.div_rn(levels, tl.where(usable, largest, 1.0)), 0.0)
    step = tl.where(finite, tl.div_rn(largest, levels), float("nan"))
    x0, y0, c0 = pack(v0, usable, inverse, DIGITS)
    x1, y1, c1 = pack(v1, usable, inverse, DIGITS)
    x2, y2, c2 = pack(v2, usable, inverse, DIGITS)
    x3, y3, c3 = pack(v3, usable, inverse, DIGITS)
    x4, y4, c4 = pack(v4, usable, inverse, DIGITS)
    x5, y5, c5 = pack(v5, usable, inverse, DIGITS)
    x6, y6, c6 = pack(v6, usable, inverse, DIGITS)
    x7, y7, c7 = pack(v7, usable, inverse, DIGITS)
    sums = tl.sum(c0 + c1 + c2 + c3 + c4 + c5 + c6 + c7, 1)
    return x0, x1, x2, x3, x4, x5, x6, x7, y0, y1, y2, y3, y4, y5, y6, y7, sums, step


@triton.jit
def store_words(words, blocks, inside, x0, x1, x2, x3, x4, x5, x6, x7):
    """Words of eight column groups, `blocks` apart."""
    tl.store(words, x0, mask=inside)
    tl.store(words + blocks, x1, mask=inside)
    tl.store(words + 2 * blocks, x2, mask=inside)
    tl.store(words + 3 * blocks, x3, mask=inside)
    tl.store(words + 4 * blocks, x4, mask=inside)
    tl.store(words + 5 * blocks, x5, mask=inside)
    tl.store(words + 6 * blocks, x6, mask=inside)
    tl.store(words + 7 * blocks, x7, mask=inside)


@triton.jit
def round_tokens(
    x, column_scale, words, scale, sums, columns, blocks,
    LEVELS: tl.constexpr, DIGITS: tl.constexpr, CHUNK_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
    HAS_COLUMN_SCALE: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of columns of one token; x: float [tokens, columns], the rest as `round_words` returns it."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    x0, x1, x2, x3, x4, x5, x6, x7, y0, y1, y2, y3, y4, y5, y6, y7, total, step = round_blocks(
        x + token * columns, column_scale, k, columns, LEVELS, DIGITS, CHUNK_BLOCKS, BLOCKS, HAS_COLUMN_SCALE
    )
    inside = k < blocks
    place = words + token * (DIGITS * 8) * blocks + k
    store_words(place, blocks, inside, x0, x1, x2, x3, x4, x5, x6, x7)
    if DIGITS == 2:
        store_words(place + 8 * blocks, blocks, inside, y0, y1, y2, y3, y4, y5, y6, y7)
    tl.store(sums + token * blocks + k, total, mask=inside)
    tl.store(scale + token * blocks + k, step, mask=inside)


def round_words(x_TI: Tensor, column_scale: Tensor | None, chunk: int, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Activation codes as int32 words of four int8 digits, with their scales float32 and sums int32.

    Words [T, digits, 8, blocks], so that threads of neighbouring blocks read neighbouring words: byte t of word i is
    column 4 i + t of the block. Scales (a chunk's, repeated) and sums (a block's) [T, blocks].
    The input, float of any kind, is multiplied by the column scale first and rounded as `reference.round_activations`
    does; a chunk with NaN or infinity has codes 0 and the scale NaN.
    """
    tokens, columns = x_TI.shape
    x_TI = x_TI.contiguous()
    blocks, digits = -(-columns // COLUMNS), 1 if levels < 256 else 2
    words = torch.empty(tokens, digits, 8, blocks, dtype=torch.int32, device=x_TI.device)
    scale = torch.empty(tokens, blocks, device=x_TI.device)
    sums = torch.empty(tokens, blocks, dtype=torch.int32, device=x_TI.device)
    round_tokens[(tokens, -(-blocks // TILE))](
        x_TI, words if column_scale is None else column_scale, words, scale, sums, columns, blocks,
        LEVELS=levels, DIGITS=digits, CHUNK_BLOCKS=chunk // COLUMNS, BLOCKS=TILE,
        HAS_COLUMN_SCALE=column_scale is not None, num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return words, scale, sums


def slow_round_words(
    x_TI: Tensor, column_scale: Tensor | None, chunk: int, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The slow twin of `round_words`: the same bits, step by step in torch."""
    tokens, columns = x_TI.shape
    blocks = -(-columns // COLUMNS)
    x_TI = x_TI.float() if column_scale is None else x_TI.float() * column_scale.float()
    padded = torch.nn.functional.pad(x_TI, (0, -columns % chunk)).view(tokens, -1, chunk)
    largest = padded.abs().amax(-1, keepdim=True)
    finite, most = largest.isfinite(), torch.full_like(largest, levels)
    usable = finite & (largest >= SMALLEST)
    codes = torch.where(usable, padded * torch.where(usable, most / largest, 0.0), 0.0).round().to(torch.int32)
    scale = torch.where(finite, largest / most, torch.nan)  # by a tensor: a GPU multiplies by the inverse of a number
    scale = scale.expand(-1, -1, chunk // COLUMNS).reshape(tokens, -1)[:, :blocks]
    total = codes.view(tokens, -1, COLUMNS).sum(-1, dtype=torch.int32)[:, :blocks]
    codes = codes.view(tokens, -1)[:, : blocks * COLUMNS]
    upper = (codes + 128) >> 8
    digits = torch.stack([codes] if levels < 256 else [upper, codes - 256 * upper], dim=1)
    words = digits.to(torch.int8).contiguous().view(torch.int32).view(tokens, -1, blocks, 8)
    return words.transpose(-1, -2).contiguous(), scale.contiguous(), total.contiguous()
