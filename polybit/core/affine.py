"""Affine quantization: codes, scale, zero – the only place of the package where rounding happens.

One stored weight has `bits` = B wide codes u in groups of columns, and one value at every width b <= B:

    p_b = u >> (B - b)                                  the b most significant bits
    w_b = s * ( 2^(B-b) * r_b * (p_b - c_b) + c_B - z ) with c_b = (2^b - 1) / 2

s (scale) and z (zero point, in codes) belong to a group; r_b is a ratio per layer or group that re-tunes a narrower
width (r_B = 1). At b = B this is the familiar s * (u - z). A symmetric grid has z = c_B, or 2^(B-1) when zero must be
a level. A column scale (AWQ) multiplies the columns of w_b; at run time the input is multiplied instead.
Suffixes: O output rows, I input columns, G groups of `group_size` columns (the last group may be shorter).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import frexp, isfinite
from typing import Literal

import torch
from torch import Tensor

from polybit.core.precision import check_width
from polybit.core.runtime import PolybitError

ZeroKind = Literal["centre", "level", "group"]
RATIO_LEVELS = 16  # a per-group ratio is stored as a 4-bit index


@dataclass(frozen=True, slots=True)
class Grid:
    """Which numbers a quantized weight may take.

    zero: "centre" = symmetric about a half-integer code (no zero level, nothing stored); "level" = symmetric with an
    exact zero (z = 2^(bits-1), nothing stored); "group" = asymmetric, one integer zero point of `bits` bits per group.
    group_size 0 = one group per output row.
    """

    bits: int
    group_size: int = 0
    zero: ZeroKind = "centre"

    def __post_init__(self) -> None:
        check_width("w", self.bits)
        if self.group_size not in (0, 16, 32, 64, 128, 256):
            raise PolybitError(
                f"group size {self.group_size!r} is not possible: choose 16, 32, 64, 128, 256, or 0 for one per row"
            )

    def groups(self, columns: int) -> int:
        """Number of groups in a row of `columns` weights."""
        return -(-columns // self.group_size) if self.group_size else 1

    def fixed_zero(self) -> float | None:
        """The zero point all groups share, or None when each group stores its own."""
        return {"centre": centre(self.bits), "level": float(1 << (self.bits - 1)), "group": None}[self.zero]

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Effective bits: codes plus 16-bit scales plus stored zero points, per weight."""
        per_group = 16 + (self.bits if self.zero == "group" else 0)
        return self.bits + per_group * self.groups(columns) / columns


def centre(bits: int) -> float:
    """Middle of the code range, c_b = (2^b - 1) / 2."""
    return ((1 << bits) - 1) / 2


@dataclass(frozen=True, slots=True)
class QWeight:
    """Codes, scale and zero of one weight matrix; immutable by convention.

    codes_OI: uint8 in 0..2^bits-1 · scale_OG: float32, already rounded to what is stored (`storable_scale`); a scale
    may be negative · zero: float32 [O, G], or a 0-dim tensor when all groups share it · ratios: width -> 0-dim or
    [O, G] float32 tensor · column_scale_I: float32 [I], representable in 16 bits, or None.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero: Tensor
    bits: int
    group_size: int
    ratios: Mapping[int, Tensor] = field(default_factory=dict)
    column_scale_I: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(output rows, input columns)."""
        return self.codes_OI.shape[0], self.codes_OI.shape[1]

    def dequantize(self, width: int | None = None) -> Tensor:
        """The weight in float32 [O, I] as seen at `width` bits (default: all stored bits)."""
        width = self.bits if width is None else width
        if not 1 <= width <= self.bits:
            raise PolybitError(f"width {width} is not stored: choose 1 to {self.bits}")
        prefix_OI = (self.codes_OI >> (self.bits - width)).float() - centre(width)
        ratio = self.ratios.get(width, torch.ones(()))
        step = ratio * 2.0 ** (self.bits - width) * torch.ones_like(self.scale_OG)
        offset = (centre(self.bits) - self.zero) * torch.ones_like(self.scale_OG)
        spread = lambda x_OG: expand_groups(x_OG, self.shape[1], self.group_size)  # noqa: E731
        weight_OI = spread(self.scale_OG) * (spread(step) * prefix_OI + spread(offset))
        return weight_OI if self.column_scale_I is None else weight_OI * self.column_scale_I

    def bits_per_weight(self) -> float:
        """Effective bits per weight of what is stored: codes, 16-bit scales, zero points, ratios."""
        rows, columns = self.shape
        groups = self.scale_OG.shape[1]
        per_group = 16 + (self.bits if self.zero.ndim else 0)
        per_group += sum(4 for ratio in self.ratios.values() if ratio.ndim)
        per_layer = sum(64 if ratio.ndim else 32 for ratio in self.ratios.values())
        per_layer += 0 if self.column_scale_I is None else 16 * columns
        return self.bits + per_group * groups / columns + per_layer / (rows * columns)


def expand_groups(values_OG: Tensor, columns: int, group_size: int) -> Tensor:
    """Repeat one value per group over the group's columns: [O, G] -> [O, I]."""
    if not group_size:
        return values_OG.expand(-1, columns)
    return values_OG.repeat_interleave(group_size, dim=1)[:, :columns]


def split_groups(weight_OI: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Cut rows into groups: ([O, G, group], mask [G, group] that is False on the padding of a short last group)."""
    rows, columns = weight_OI.shape
    size = group_size or columns
    groups = -(-columns // size)
    padded = torch.nn.functional.pad(weight_OI, (0, groups * size - columns))
    mask = torch.arange(groups * size, device=weight_OI.device) < columns
    return padded.view(rows, groups, size), mask.view(groups, size)


def scale_gain(scale_OG: Tensor) -> float:
    """A power of two that brings a layer's largest scale near 1, so that 16-bit floats hold every scale well."""
    largest = float(scale_OG.abs().max()) if scale_OG.numel() else 0.0
    if not isfinite(largest) or largest == 0.0:
        return 1.0
    return 2.0 ** max(-126, min(126, frexp(largest)[1]))


def storable_scale(scale_OG: Tensor) -> Tensor:
    """Round scales to what the checkpoint keeps: a 16-bit float times one power of two per layer; never zero."""
    gain = scale_gain(scale_OG)
    half = (scale_OG.float() / gain).half()
    tiny = torch.full_like(half, 2.0**-24)
    return torch.where(half == 0, tiny, half).float() * gain


def encode(weight_OI: Tensor, scale_OG: Tensor, zero: Tensor, bits: int, group_size: int) -> Tensor:
    """Nearest codes for a weight: clip(round(w / s + z), 0, 2^bits - 1), uint8 [O, I]."""
    spread = lambda x: expand_groups(x, weight_OI.shape[1], group_size)  # noqa: E731
    scale_OI, zero_OI = spread(scale_OG), spread(zero * torch.ones_like(scale_OG))
    return round_half_up(weight_OI.float() / scale_OI + zero_OI).clamp_(0, (1 << bits) - 1).to(torch.uint8)


def round_half_up(x: Tensor) -> Tensor:
    """Round to the nearest integer, ties upwards: the one rounding rule of the package."""
    return torch.floor(x + 0.5)


def fake_quantize_tokens(x_TI: Tensor, bits: int) -> Tensor:
    """Round activations to `bits` bits, symmetric with one scale per token (the last axis); gradients pass straight.

    LLM-QAT (arXiv 2305.17888) §2.2: s = max|x| / (2^(b-1) - 1).
    """
    top = (1 << (bits - 1)) - 1
    scale = x_TI.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / top
    rounded = round_half_up(x_TI / scale).clamp(-top, top) * scale
    return x_TI + (rounded - x_TI).detach() if x_TI.requires_grad else rounded
