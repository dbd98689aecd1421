"""Affine quantization: codes, scale, zero – the only place of the package where rounding happens.

One stored weight has `bits` = B wide codes u in groups of columns, and one value at every width b <= B:

    p_b = u >> (B - b)                                  the b most significant bits
    w_b = s * ( 2^(B-b) * r_b * (p_b - c_b) + c_B - z ) with c_b = (2^b - 1) / 2

s (scale) and z (zero point, in codes) belong to a group; r_b is a ratio per layer or group that re-tunes a narrower
width (r_B = 1). At b = B this is the familiar s * (u - z). A symmetric grid has z = c_B, or 2^(B-1) when zero must be
a level. A column scale (AWQ) multiplies the columns of w_b; at run time the input is multiplied instead.
A ragged weight has a width B_g per group (`bits_G`), its codes, zero point and c_{B_g} of that width; reading it at
`width` reads every group at min(width, B_g).
Suffixes: O output rows, I input columns, G groups of `group_size` columns (the last group may be shorter).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import frexp, isfinite
from typing import Any, Literal

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
    group_size 0 = one group per output row. bits_G: a width of its own for every group, 1 to 8, with `bits` the
    largest; see `with_widths`.
    """

    bits: int
    group_size: int = 0
    zero: ZeroKind = "centre"
    bits_G: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.bits != 1:  # one bit is no width of a layer, but groups inside a ragged one may have it
            check_width("w", self.bits)
        if self.bits_G is not None and (min(self.bits_G, default=0) < 1 or max(self.bits_G) != self.bits):
            raise PolybitError(
                f"group widths {list(self.bits_G)!r:.60} do not fit a grid of {self.bits} bits: "
                f"give one width from 1 to {self.bits} per group, the largest {self.bits}"
            )
        if self.group_size not in (0, 16, 32, 64, 128, 256):
            raise PolybitError(
                f"group size {self.group_size!r} is not possible: choose 16, 32, 64, 128, 256, or 0 for one per row"
            )

    def groups(self, columns: int) -> int:
        """Number of groups in a row of `columns` weights."""
        return -(-columns // self.group_size) if self.group_size else 1

    def with_widths(self, bits_G: Sequence[int]) -> Grid:
        """The same grid with a width per group; equal widths give a plain grid."""
        widths = tuple(int(b) for b in bits_G)
        ragged = len(set(widths)) > 1
        return replace(self, bits=max(widths, default=0), bits_G=widths if ragged else None)

    def group_bits(self, columns: int) -> Tensor:
        """Width of every group in a row of `columns` weights, int64 [G]."""
        count = self.groups(columns)
        if self.bits_G is None:
            return torch.full((count,), self.bits)
        if len(self.bits_G) != count:
            raise PolybitError(
                f"{len(self.bits_G)} group widths were given for {columns} input columns in groups of "
                f"{self.group_size or columns}: give {count}"
            )
        return torch.tensor(self.bits_G)

    def by_width(self, columns: int) -> Iterator[tuple[Grid, slice | Tensor]]:
        """(plain grid, which groups have it) for every width there is; one pair, all groups, for a plain grid."""
        if self.bits_G is None:
            yield self, slice(None)
            return
        bits_G = self.group_bits(columns)
        for bits in sorted(set(self.bits_G)):
            yield replace(self, bits=bits, bits_G=None), torch.nonzero(bits_G == bits).flatten()

    def fixed_zero(self) -> float | None:
        """The zero point all groups share (that of the widest: `zero_points`), or None when each stores its own."""
        return {"centre": centre(self.bits), "level": float(1 << (self.bits - 1)), "group": None}[self.zero]

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Effective bits: codes plus 16-bit scales plus stored zero points, per weight."""
        bits_G = self.group_bits(columns)
        mean = float((bits_G * group_lengths(columns, self.group_size)).sum()) / columns
        zeros = int(bits_G.sum()) if self.zero == "group" else 0
        widths = 0.0 if self.bits_G is None else 8 * len(bits_G) / (rows * columns)
        return mean + (16 * len(bits_G) + zeros) / columns + widths


def centre(bits: int) -> float:
    """Middle of the code range, c_b = (2^b - 1) / 2."""
    return ((1 << bits) - 1) / 2


def tops(bits_G: Tensor) -> Tensor:
    """Largest code of each width, 2^b - 1, float32."""
    return ((1 << bits_G.long()) - 1).float()


def zero_points(zero: Tensor, bits: int, bits_G: Tensor | None) -> Tensor:
    """Zero point of every group in codes of its own width: [O, G] as stored, or [G] or 0-dim where all share one.

    A shared zero point is given for the widest groups: what all groups share is c_B - z, the value of the middle of the
    code range, so that a symmetric grid stays symmetric at every width.
    """
    if zero.ndim or bits_G is None:
        return zero
    return (tops(bits_G) / 2).to(zero) - (centre(bits) - zero)


@dataclass(frozen=True, slots=True)
class QWeight:
    """Codes, scale and zero of one weight matrix; immutable by convention.

    codes_OI: uint8 in 0..2^bits-1 · scale_OG: float32, already rounded to what is stored (`storable_scale`); a scale
    may be negative · zero: float32 [O, G], or a 0-dim tensor when all groups share it · ratios: width -> 0-dim or
    [O, G] float32 tensor · column_scale_I: float32 [I], representable in 16 bits, or None · bits_G: uint8 [G], a width
    per group of which `bits` is the largest (codes of group g in 0..2^bits_G[g]-1, its scale and zero point those of
    that width, a 0-dim zero that of the widest: `zero_points`), or None when all groups have `bits`.
    """

    codes_OI: Tensor
    scale_OG: Tensor
    zero: Tensor
    bits: int
    group_size: int
    ratios: Mapping[int, Tensor] = field(default_factory=dict)
    column_scale_I: Tensor | None = None
    bits_G: Tensor | None = None

    def __post_init__(self) -> None:
        bits_G = self.bits_G
        if bits_G is not None and (len(bits_G) != self.scale_OG.shape[1] or int(bits_G.max()) != self.bits):
            raise PolybitError(
                f"a weight of {self.scale_OG.shape[1]} groups and {self.bits} bits got {len(bits_G)} widths up to "
                f"{int(bits_G.max())}: give one per group, the largest {self.bits}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(output rows, input columns)."""
        return self.codes_OI.shape[0], self.codes_OI.shape[1]

    def to(self, device: torch.device | str) -> QWeight:
        """The same on another device."""
        there: dict[str, Any] = {
            name: value.to(device)
            for name in ("codes_OI", "scale_OG", "zero", "column_scale_I", "bits_G")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, ratios={width: ratio.to(device) for width, ratio in self.ratios.items()}, **there)

    def stored_widths(self) -> Tensor:
        """Bits stored of every group, int64 [G]."""
        if self.bits_G is not None:
            return self.bits_G.long()
        return torch.full((self.scale_OG.shape[1],), self.bits, device=self.codes_OI.device)

    def read_widths(self, width: int | Tensor | None) -> Tensor:
        """Bits read of every group, int64 [G]; a number is the most any group is read at, a tensor one per group."""
        stored_G = self.stored_widths()
        if isinstance(width, Tensor):
            return torch.minimum(width.to(stored_G).clamp_min(1), stored_G)
        width = self.bits if width is None else width
        if not 1 <= width <= self.bits:
            raise PolybitError(f"width {width} is not stored: choose 1 to {self.bits}")
        return stored_G.clamp_max(width)

    def dequantize(self, width: int | Tensor | None = None) -> Tensor:
        """The weight in float32 [O, I] as seen at `width` bits (default: all stored bits; an int tensor [G]: a width
        per group, clamped to 1..stored, which is how column offsets apply to nested codes)."""
        if self.bits_G is None and not isinstance(width, Tensor):
            return self.dequantize_even(self.bits if width is None else width)
        spread = lambda x: expand_groups(x, self.shape[1], self.group_size)  # noqa: E731
        stored_G, read_G = self.stored_widths(), self.read_widths(width)
        shift_G = stored_G - read_G
        step_OG = (2.0**shift_G).expand_as(self.scale_OG)
        for b, ratio in self.ratios.items():
            # where, not a mask: on a GPU an index of truths would wait for the device
            step_OG = torch.where((read_G == b) & (shift_G > 0), step_OG * ratio, step_OG)
        zero = zero_points(self.zero, self.bits, self.bits_G)
        offset_OG = (tops(stored_G) / 2 - zero).expand_as(self.scale_OG)
        prefix_OI = (self.codes_OI >> spread(shift_G[None].to(torch.uint8))).float() - spread(tops(read_G)[None] / 2)
        weight_OI = spread(self.scale_OG) * (spread(step_OG) * prefix_OI + spread(offset_OG))
        return weight_OI if self.column_scale_I is None else weight_OI * self.column_scale_I

    def dequantize_even(self, width: int) -> Tensor:
        """`dequantize` where all groups are stored and read at one width, to the last bit the same in fewer steps."""
        if not 1 <= width <= self.bits:
            raise PolybitError(f"width {width} is not stored: choose 1 to {self.bits}")
        spread = lambda x: expand_groups(x, self.shape[1], self.group_size) if x.ndim else x  # noqa: E731
        shift = self.bits - width
        weight_OI = ((self.codes_OI >> shift) if shift else self.codes_OI).float() - centre(width)
        if shift:
            ratio = self.ratios.get(width)
            weight_OI = weight_OI * (2.0**shift if ratio is None else spread(ratio * 2.0**shift))
        weight_OI = spread(self.scale_OG) * (weight_OI + spread(centre(self.bits) - self.zero))
        return weight_OI if self.column_scale_I is None else weight_OI * self.column_scale_I

    def bits_per_weight(self) -> float:
        """Effective bits per weight of what is stored: codes, 16-bit scales, zero points, ratios, group widths."""
        rows, columns = self.shape
        stored_G = self.stored_widths()
        groups = len(stored_G)
        codes = float((stored_G * group_lengths(columns, self.group_size).to(stored_G)).sum())
        per_row = 16 * groups + (int(stored_G.sum()) if self.zero.ndim else 0)
        per_row += sum(4 * groups for ratio in self.ratios.values() if ratio.ndim)
        per_layer = sum(64 if ratio.ndim else 32 for ratio in self.ratios.values())
        per_layer += 0 if self.column_scale_I is None else 16 * columns
        per_layer += 0 if self.bits_G is None else 8 * groups
        return (codes + per_row) / columns + per_layer / (rows * columns)


def group_lengths(columns: int, group_size: int) -> Tensor:
    """Columns of each group, int64 [G]; the last one may be shorter."""
    size = group_size or columns
    starts_G = torch.arange(0, columns, size)
    return (columns - starts_G).clamp_max(size)


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
    gain = scale_gain(scale_OG) if scale_OG.is_cpu else device_gain(scale_OG)
    half = (scale_OG.float() / gain).half()
    return torch.where(half == 0, 2.0**-24, half).float() * gain


def device_gain(scale_OG: Tensor) -> Tensor:
    """`scale_gain` as a float32 tensor where the scales are: training rounds them at every step, and a GPU must not be
    waited for. The power of two is put together from its exponent, which is exact everywhere.
    """
    largest = scale_OG.abs().max() if scale_OG.numel() else scale_OG.new_zeros(())
    exponent = torch.frexp(largest)[1].to(torch.int32).clamp(-126, 126)
    usable = torch.isfinite(largest) & (largest != 0)
    return torch.where(usable, ((exponent + 127) << 23).view(torch.float32), 1.0)


def encode(
    weight_OI: Tensor, scale_OG: Tensor, zero: Tensor, bits: int, group_size: int, bits_G: Tensor | None = None
) -> Tensor:
    """Nearest codes for a weight: clip(round(w / s + z), 0, 2^b - 1), uint8 [O, I], with b = `bits` or bits_G[g]."""
    spread = lambda x: expand_groups(x, weight_OI.shape[1], group_size)  # noqa: E731
    zero = zero_points(zero, bits, bits_G)
    scale_OI, zero_OI = spread(scale_OG), spread(zero * torch.ones_like(scale_OG)) if zero.ndim else zero
    nearest_OI = round_half_up(weight_OI.float() / scale_OI + zero_OI)
    if bits_G is None:
        return nearest_OI.clamp_(0, (1 << bits) - 1).to(torch.uint8)
    return torch.minimum(nearest_OI.clamp_(min=0), spread(tops(bits_G)[None]).to(nearest_OI)).to(torch.uint8)


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
