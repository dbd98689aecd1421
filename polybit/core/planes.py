"""Nested bit planes: one stored weight, of which width b reads only the b most significant planes.

Layout (docs/format.md, made for vector units; every engine reads the same bytes):
plane 0 holds the most significant bits. A plane is uint8 [O/16, I/32, 64]: rows padded to 16, columns to 32. Byte lane
4*r + t of a block, bit i, belongs to row r of the 16 and column 4*i + t of the 32. Scales are float16 [O/16, G, 16]
times one power of two (`gain`), zero points uint8 [O/16, G, 16]. Padding codes are 0 and their columns are never used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from polybit.core.affine import RATIO_LEVELS, QWeight, round_half_up, scale_gain
from polybit.core.runtime import PolybitError

ROWS, COLUMNS = 16, 32  # rows and columns of one block


@dataclass(frozen=True, slots=True)
class RatioTable:
    """Ratios of one narrower width: a single number, or a 4-bit index per group between `low` and `high`.

    index: uint8 [O/16, G, 8]; byte r holds row r of the block in its low nibble and row r + 8 in its high nibble.
    """

    low: float
    high: float
    index: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Planes:
    """A QWeight as it is stored and read by the kernels."""

    planes: Tensor  # uint8 [bits, O/16, I/32, 64]
    scale: Tensor  # float16 [O/16, G, 16]
    zero: Tensor | float  # uint8 [O/16, G, 16], or one number for all groups
    gain: float
    shape: tuple[int, int]
    group_size: int
    ratios: Mapping[int, RatioTable] = field(default_factory=dict)
    column_scale: Tensor | None = None  # float16 [I]

    @property
    def bits(self) -> int:
        """Stored width: the number of planes."""
        return self.planes.shape[0]

    def nbytes(self, width: int | None = None) -> int:
        """Bytes read at `width` (default: everything stored): planes, scales, zero points, ratio indices."""
        planes = self.planes if width is None else self.planes[:width]
        tables = [t.index for b, t in self.ratios.items() if t.index is not None and width in (None, b)]
        optional = [t for t in (self.zero, self.column_scale) if isinstance(t, Tensor)]
        tensors = [planes, self.scale, *optional, *tables]
        return sum(t.numel() * t.element_size() for t in tensors)


def pack(q: QWeight) -> Planes:
    """Lay a QWeight out in planes; `unpack` gives it back bit for bit."""
    gain = scale_gain(q.scale_OG)
    stored = (q.scale_OG / gain).half()
    if not torch.equal(stored.float() * gain, q.scale_OG):
        raise PolybitError("the scales of a QWeight are not storable: round them with affine.storable_scale first")
    zero = block_rows(integer_zero(q), torch.uint8) if q.zero.ndim else float(q.zero)
    ratios = {b: pack_ratio(r) for b, r in q.ratios.items()}
    column_scale = None if q.column_scale_I is None else q.column_scale_I.half()
    codes = pack_codes(q.codes_OI, q.bits)
    return Planes(codes, block_rows(stored, torch.float16), zero, gain, q.shape, q.group_size, ratios, column_scale)


def unpack(p: Planes, width: int | None = None) -> QWeight:
    """Read `width` planes (default: all). Narrower codes keep their place: the low, unread bits are zero."""
    width = p.bits if width is None else width
    if not 1 <= width <= p.bits:
        raise PolybitError(f"width {width} is not stored: choose 1 to {p.bits}")
    rows = p.shape[0]
    codes_OI = unpack_codes(p.planes[:width], p.shape) << (p.bits - width)
    scale_OG = unblock_rows(p.scale, rows).float() * p.gain
    zero = unblock_rows(p.zero, rows).float() if isinstance(p.zero, Tensor) else torch.tensor(p.zero)
    ratios = {b: unpack_ratio(t, rows) for b, t in p.ratios.items()}
    column_scale = None if p.column_scale is None else p.column_scale.float()
    return QWeight(codes_OI, scale_OG, zero, p.bits, p.group_size, ratios, column_scale)


def pack_codes(codes_OI: Tensor, bits: int) -> Tensor:
    """uint8 codes [O, I] -> planes [bits, O/16, I/32, 64], most significant first."""
    rows, columns = codes_OI.shape
    padded = pad(codes_OI, (0, -columns % COLUMNS, 0, -rows % ROWS))
    # [row block, r, column block, i, t]: column = 32*block + 4*i + t
    blocks = padded.view(-1, ROWS, padded.shape[1] // COLUMNS, 8, 4).permute(0, 2, 1, 4, 3).contiguous()
    weights = (1 << torch.arange(8, dtype=torch.uint8, device=codes_OI.device)).to(torch.uint8)
    planes = [(((blocks >> (bits - 1 - p)) & 1) * weights).sum(-1, dtype=torch.uint8) for p in range(bits)]
    return torch.stack(planes).flatten(-2).contiguous()


def unpack_codes(planes: Tensor, shape: tuple[int, int]) -> Tensor:
    """Planes [b, O/16, I/32, 64] -> uint8 codes of b bits [O, I]."""
    width, row_blocks, column_blocks, _ = planes.shape
    codes = torch.zeros(row_blocks, column_blocks, ROWS, 4, 8, dtype=torch.uint8, device=planes.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=planes.device)
    for plane in planes.view(width, row_blocks, column_blocks, ROWS, 4):
        codes = (codes << 1) | ((plane.unsqueeze(-1) >> shifts) & 1)
    flat = codes.permute(0, 2, 1, 4, 3).reshape(row_blocks * ROWS, column_blocks * COLUMNS)
    return flat[: shape[0], : shape[1]].contiguous()


def block_rows(values_OG: Tensor, dtype: torch.dtype) -> Tensor:
    """[O, G] -> [O/16, G, 16], rows padded with zeros."""
    padded = pad(values_OG.to(dtype), (0, 0, 0, -values_OG.shape[0] % ROWS))
    return padded.view(-1, ROWS, values_OG.shape[1]).transpose(1, 2).contiguous()


def unblock_rows(blocked: Tensor, rows: int) -> Tensor:
    """The inverse of block_rows."""
    return blocked.transpose(1, 2).reshape(-1, blocked.shape[1])[:rows].contiguous()


def integer_zero(q: QWeight) -> Tensor:
    """Zero points as uint8, refused when they are not integers of `bits` bits."""
    zero = q.zero
    if not torch.equal(zero, zero.round().clamp(0, (1 << q.bits) - 1)):
        raise PolybitError(f"zero points must be integers from 0 to {(1 << q.bits) - 1} to be stored")
    return zero.to(torch.uint8)


def ratio_levels(low: float, high: float) -> Tensor:
    """The RATIO_LEVELS equally spaced values a stored ratio may take, float32.

    Computed in float64 and rounded once, so that every machine and every kernel gets the same bits.
    """
    steps = torch.arange(RATIO_LEVELS, dtype=torch.float64)
    return (low + (high - low) / (RATIO_LEVELS - 1) * steps).float()


def storable_ratio(ratio: Tensor) -> Tensor:
    """Round per-group ratios to the stored levels (a 0-dim ratio is stored as it is)."""
    if not ratio.ndim:
        return ratio.float()
    low, high = float(ratio.min()), float(ratio.max())
    return ratio_levels(low, high)[ratio_index(ratio, low, high)]


def ratio_index(ratio: Tensor, low: float, high: float) -> Tensor:
    """Index of the nearest stored level, int64."""
    step = max(high - low, 1e-12) / (RATIO_LEVELS - 1)
    return round_half_up((ratio - low) / step).clamp(0, RATIO_LEVELS - 1).long()


def pack_ratio(ratio: Tensor) -> RatioTable:
    """A ratio tensor of a QWeight -> what is stored."""
    if not ratio.ndim:
        return RatioTable(float(ratio), float(ratio))
    low, high = float(ratio.min()), float(ratio.max())
    index = ratio_index(ratio, low, high)
    if not torch.equal(ratio_levels(low, high)[index], ratio.float()):
        raise PolybitError("the ratios of a QWeight are not storable: round them with planes.storable_ratio first")
    blocked = block_rows(index, torch.uint8)
    return RatioTable(low, high, blocked[..., :8] | (blocked[..., 8:] << 4))


def unpack_ratio(table: RatioTable, rows: int) -> Tensor:
    """The inverse of pack_ratio."""
    if table.index is None:
        return torch.tensor(table.low)
    blocked = torch.cat([table.index & 15, table.index >> 4], dim=-1)
    return ratio_levels(table.low, table.high)[unblock_rows(blocked, rows).long()]
