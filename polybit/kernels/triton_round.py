"""Rounding of activations on a GPU: one launch gives codes as words of four int8 digits, their scales and sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polybit.core.planes import COLUMNS
from polybit.kernels.reference import SMALLEST

TILE = 1024  # columns of one program
WARPS = 4
TINY = tl.constexpr(SMALLEST)
MAGIC = tl.constexpr(1.5 * 2**23)  # float32 numbers of this size are integers: adding it rounds, ties to even


@triton.jit
def round_chunks(
    x, column_scale, words, scale, sums, columns, blocks, chunks,
    LEVELS: tl.constexpr, DIGITS: tl.constexpr, CHUNK_BLOCKS: tl.constexpr, CHUNKS: tl.constexpr,
    BY_BLOCK: tl.constexpr, HAS_COLUMN_SCALE: tl.constexpr,
):  # fmt: skip
    """Some chunks of one token; see `round_words`. Must be compiled without fusing products and sums.

    x: float [tokens, columns] · words: int32 [tokens, DIGITS, blocks, 8] with scale, sums: float32, int32, one per
    chunk; or with BY_BLOCK [tokens, DIGITS, 8, blocks] and one per block of columns.
    """
    token = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * CHUNKS + tl.arange(0, CHUNKS)
    block = chunk[:, None] * CHUNK_BLOCKS + tl.arange(0, CHUNK_BLOCKS)[None, :]
    word = block[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    column = word[:, :, :, None] * 4 + tl.arange(0, 4)[None, None, None, :]
    value = tl.load(x + token * columns + column, mask=column < columns, other=0.0).to(tl.float32)
    if HAS_COLUMN_SCALE:
        value *= tl.load(column_scale + column, mask=column < columns, other=0.0).to(tl.float32)
    # as integers, magnitudes are ordered like the numbers, infinity and then NaN last
    size = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    size = tl.max(tl.max(tl.max(size, 3), 2), 1)
    finite, largest = size < 0x7F800000, size.to(tl.float32, bitcast=True)
    usable = finite & (largest >= TINY)
    levels = tl.full((CHUNKS,), LEVELS, tl.float32)
    inverse = tl.where(usable, tl.div_rn(levels, tl.where(usable, largest, 1.0)), 0.0)
    scaled = tl.where(usable[:, None, None, None], value, 0.0) * inverse[:, None, None, None]
    codes = ((scaled + MAGIC) - MAGIC).to(tl.int32)
    shift = (tl.arange(0, 4) * 8)[None, None, None, :]
    first, second = codes, codes
    if DIGITS == 2:
        first = (codes + 128) >> 8
        second = codes - 256 * first
    stored = words + token * (DIGITS * 8) * blocks + word
    if BY_BLOCK:
        stored = words + token * (DIGITS * 8) * blocks + (word % 8) * blocks + word // 8
    tl.store(stored, tl.sum((first & 255) << shift, 3), mask=word < blocks * 8)
    if DIGITS == 2:
        tl.store(stored + blocks * 8, tl.sum((second & 255) << shift, 3), mask=word < blocks * 8)
    total = tl.sum(tl.sum(codes, 3), 2)
    step = tl.where(finite, tl.div_rn(largest, levels), float("nan"))
    if BY_BLOCK:
        place, real = token * blocks + block, block < blocks
        tl.store(sums + place, total, mask=real)
        tl.store(scale + place, step[:, None] + tl.zeros((CHUNKS, CHUNK_BLOCKS), tl.float32), mask=real)
    else:
        tl.store(sums + token * chunks + chunk, tl.sum(total, 1), mask=chunk < chunks)
        tl.store(scale + token * chunks + chunk, step, mask=chunk < chunks)


def round_words(
    x_TI: Tensor, column_scale: Tensor | None, chunk: int, levels: int, *, by_block: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Activation codes as int32 words of four int8 digits, with their scales float32 and sums int32.

    Words [T, digits, blocks, 8] in the order of the columns, scales and sums [T, chunks]; or with `by_block`
    [T, digits, 8, blocks], so that threads of neighbouring blocks read neighbouring words, and [T, blocks].
    The input, float of any kind, is multiplied by the column scale first and rounded as `reference.round_activations`
    does; a chunk with NaN or infinity has codes 0 and the scale NaN.
    """
    tokens, columns = x_TI.shape
    x_TI = x_TI.contiguous()
    blocks, chunks, digits = -(-columns // COLUMNS), -(-columns // chunk), 1 if levels < 256 else 2
    shape = (8, blocks) if by_block else (blocks, 8)
    words = torch.empty(tokens, digits, *shape, dtype=torch.int32, device=x_TI.device)
    scale = torch.empty(tokens, blocks if by_block else chunks, device=x_TI.device)
    sums = torch.empty(scale.shape, dtype=torch.int32, device=x_TI.device)
    some = TILE // chunk
    round_chunks[(tokens, -(-chunks // some))](
        x_TI, words if column_scale is None else column_scale, words, scale, sums, columns, blocks, chunks,
        LEVELS=levels, DIGITS=digits, CHUNK_BLOCKS=chunk // COLUMNS, CHUNKS=some,
        BY_BLOCK=by_block, HAS_COLUMN_SCALE=column_scale is not None,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return words, scale, sums


def slow_round_words(
    x_TI: Tensor, column_scale: Tensor | None, chunk: int, levels: int, *, by_block: bool
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
    total = codes.sum(-1, dtype=torch.int32)
    if by_block:
        scale = scale.expand(-1, -1, chunk // COLUMNS).reshape(tokens, -1)[:, :blocks]
        total = codes.view(tokens, -1, COLUMNS).sum(-1, dtype=torch.int32)[:, :blocks]
    codes = codes.view(tokens, -1)[:, : blocks * COLUMNS]
    upper = (codes + 128) >> 8
    digits = torch.stack([codes] if levels < 256 else [upper, codes - 256 * upper], dim=1)
    words = digits.to(torch.int8).contiguous().view(torch.int32).view(tokens, -1, blocks, 8)
    words = words.transpose(-1, -2).contiguous() if by_block else words
    return words, scale.reshape(total.shape).contiguous(), total.contiguous()
