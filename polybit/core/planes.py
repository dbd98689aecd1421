"""Nested bit planes: one stored weight, of which width b reads only the b most significant planes.

Layout (docs/format.md, made for vector units; every engine reads the same bytes):
plane 0 holds the most significant bits. A plane is uint8 [O/16, I/32, 64]: rows padded to 16, columns to 32. Byte lane
4*r + t of a block, bit i, belongs to row r of the 16 and column 4*i + t of the 32. Scales are float16 [O/16, G, 16]
times one power of two (`gain`), zero points uint8 [O/16, G, 16]. Padding codes are 0 and their columns are never used.

A ragged weight (a width per group, `bits_G`) stores of every group as many planes as it has bits. Its groups are sorted
by width, widest first and equal widths in their order; everything stored per group follows that order. The groups of
one width are a part, with planes laid out as above over its columns; the parts follow each other in one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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

    planes: Tensor  # uint8 [bits, O/16, I/32, 64]; of a ragged weight all parts' planes, uint8 [bytes]
    scale: Tensor  # float16 [O/16, G, 16]
    zero: Tensor | float  # uint8 [O/16, G, 16], or one number for all groups
    gain: float
    shape: tuple[int, int]
    group_size: int
    ratios: Mapping[int, RatioTable] = field(default_factory=dict)
    column_scale: Tensor | None = None  # float16 [I]
    bits_G: tuple[int, ...] | None = None  # stored bits of every group of a ragged weight, in the order of the columns

    @property
    def bits(self) -> int:
        """Stored width: the number of planes (of a ragged weight, of its widest groups)."""
        return self.planes.shape[0] if self.bits_G is None else max(self.bits_G)

    def apart(self, width: int | None = None) -> tuple[Any, ...]:
        """The tensors and numbers that `together` makes Planes of again, as arguments of a torch operator.

        width: leave out the ratios of all other widths. Few lists, because each costs a microsecond on its way.
        """
        if width is None:
            tables = sorted(self.ratios.items())
        else:
            tables = [(width, self.ratios[width])] if width in self.ratios else []
        zero, fixed = (self.zero, 0.0) if isinstance(self.zero, Tensor) else (None, self.zero)
        numbers, layout = [self.gain, fixed], [*self.shape, self.group_size, len(tables)]
        for b, table in tables:
            numbers += table.low, table.high
            layout.append(b)
        indices = [table.index for _, table in tables]
        if self.bits_G is not None:
            layout += self.bits_G
        return layout, self.planes, self.scale, zero, indices, self.column_scale, numbers

    @classmethod
    def together(
        cls,
        layout: Sequence[int],
        planes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        indices: Sequence[Tensor | None],
        column_scale: Tensor | None,
        numbers: Sequence[float],
    ) -> Planes:
        """The inverse of `apart`; nothing is copied.

        layout: rows, columns, group size, how many ratio tables, their widths, then the stored bits of every group of a
        ragged weight · indices: of the ratio tables · numbers: gain, fixed zero, then both ends of every table.
        """
        rows, columns, group_size, tables, *rest = layout
        ratios = (
            {rest[i]: RatioTable(numbers[2 * i + 2], numbers[2 * i + 3], indices[i]) for i in range(tables)}
            if tables
            else {}
        )
        bits_G = tuple(rest[tables:]) if len(rest) > tables else None
        fixed_or_zero = numbers[1] if zero is None else zero
        return cls(planes, scale, fixed_or_zero, numbers[0], (rows, columns), group_size, ratios, column_scale, bits_G)

    def nbytes(self, width: int | Sequence[int] | None = None) -> int:
        """Bytes read at `width` (default: everything stored): planes, scales, zero points, ratio indices.

        width: one for all groups, or one per group.
        """
        optional = [t for t in (self.zero, self.column_scale) if isinstance(t, Tensor)]
        widths = {width} if width is None or isinstance(width, int) else set(width)
        tables = [t.index for b, t in self.ratios.items() if t.index is not None and (width is None or b in widths)]
        rest = sum(t.numel() * t.element_size() for t in (self.scale, *optional, *tables))
        if width is None:
            return self.planes.numel() + rest
        lengths = column_blocks(self.shape[1], self.group_size)
        read_G = read_widths(self, width)
        return rest + -(-self.shape[0] // ROWS) * 64 * sum(b * n for b, n in zip(read_G, lengths, strict=True))


def row_parts(p: Planes, weights: int) -> Iterator[tuple[slice, Planes]]:
    """(rows, the same weight of these rows alone), of about so many weights each; a ragged weight is one part."""
    rows, columns = p.shape
    size = rows if p.bits_G is not None else max(1, weights // (columns * ROWS)) * ROWS
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        if part == slice(0, rows):
            yield part, p
            return
        blocks = slice(start // ROWS, -(-part.stop // ROWS))
        cut = lambda x, blocks=blocks: x[blocks] if isinstance(x, Tensor) else x  # noqa: E731
        yield (
            part,
            replace(
                p,
                planes=p.planes[:, blocks].contiguous(),
                scale=p.scale[blocks],
                zero=cut(p.zero),
                shape=(part.stop - start, columns),
                ratios={width: replace(table, index=cut(table.index)) for width, table in p.ratios.items()},
            ),
        )


def column_blocks(columns: int, group_size: int) -> list[int]:
    """Blocks of COLUMNS columns in every group; one that two groups of 16 share counts with the second."""
    whole = -(-columns // COLUMNS)
    if not group_size:
        return [whole]
    edges = [min(start // COLUMNS, whole) for start in range(0, columns, group_size)]
    return [stop - start for start, stop in zip(edges, [*edges[1:], whole], strict=True)]


def read_widths(p: Planes, width: int | Sequence[int]) -> tuple[int, ...]:
    """Bits read of every group: at most `width`, or each at its own of `width`, and at most what is stored."""
    groups = p.scale.shape[1]
    stored = p.bits_G or (p.bits,) * groups
    if isinstance(width, int):
        return tuple(min(width, b) for b in stored)
    if len(width) != groups:
        raise PolybitError(f"{len(width)} group widths were given for a weight of {groups} groups: give {groups}")
    return tuple(min(max(int(w), 1), b) for w, b in zip(width, stored, strict=True))


def pack(q: QWeight) -> Planes:
    """Lay a QWeight out in planes; `unpack` gives it back bit for bit."""
    gain = scale_gain(q.scale_OG)
    if not torch.equal((q.scale_OG / gain).half().float() * gain, q.scale_OG):
        raise PolybitError("the scales of a QWeight are not storable: round them with affine.storable_scale first")
    column_scale = None if q.column_scale_I is None else q.column_scale_I.half()
    bits_G = None if q.bits_G is None or int(q.bits_G.min()) == q.bits else tuple(q.bits_G.tolist())
    codes = pack_codes(q.codes_OI, q.bits) if bits_G is None else pack_parts(q, bits_G)
    zero = integer_zero(q) if q.zero.ndim else float(q.zero)
    if bits_G is not None:
        q = sort_groups(q, torch.tensor(storage_order(bits_G)))
        zero = zero[:, storage_order(bits_G)] if isinstance(zero, Tensor) else zero
    scale = block_rows((q.scale_OG / gain).half(), torch.float16)
    blocked = block_rows(zero, torch.uint8) if isinstance(zero, Tensor) else zero
    ratios = {b: pack_ratio(r) for b, r in q.ratios.items()}
    return Planes(codes, scale, blocked, gain, q.shape, q.group_size, ratios, column_scale, bits_G)


def unpack(p: Planes, width: int | None = None) -> QWeight:
    """Read `width` planes (default: all). Narrower codes keep their place: the low, unread bits are zero."""
    width = p.bits if width is None else width
    if not 1 <= width <= p.bits:
        raise PolybitError(f"width {width} is not stored: choose 1 to {p.bits}")
    rows = p.shape[0]
    scale_OG = unblock_rows(p.scale, rows).float() * p.gain
    zero = unblock_rows(p.zero, rows).float() if isinstance(p.zero, Tensor) else torch.tensor(p.zero)
    ratios = {b: unpack_ratio(t, rows) for b, t in p.ratios.items()}
    column_scale = None if p.column_scale is None else p.column_scale.float()
    codes_OI = unpack_parts(p, width) if p.bits_G else unpack_codes(p.planes[:width], p.shape) << (p.bits - width)
    q = QWeight(codes_OI, scale_OG, zero, p.bits, p.group_size, ratios, column_scale)
    if p.bits_G is None:
        return q
    bits_G = torch.tensor(p.bits_G, dtype=torch.uint8, device=p.planes.device)
    return replace(sort_groups(q, torch.tensor(storage_order(p.bits_G)).argsort()), bits_G=bits_G)


def sort_groups(q: QWeight, order: Tensor) -> QWeight:
    """What is stored per group, in another order."""
    order = order.to(q.scale_OG.device)
    zero = q.zero[:, order] if q.zero.ndim else q.zero
    ratios = {b: r[:, order] if r.ndim else r for b, r in q.ratios.items()}
    return replace(q, scale_OG=q.scale_OG[:, order], zero=zero, ratios=ratios)


@dataclass(frozen=True, slots=True)
class RaggedPart:
    """The groups of one stored width of a ragged weight, in their order, and the planes they are stored in."""

    bits: int
    groups: tuple[int, ...]
    planes: Tensor  # uint8 [bits, O/16, blocks, 64], a view of the weight's
    columns_P: Tensor  # the weight's columns that the part holds, int64


def storage_order(bits_G: Sequence[int]) -> list[int]:
    """The groups in the order they are stored: widest first, equal widths in their order."""
    return sorted(range(len(bits_G)), key=lambda g: -bits_G[g])


def ragged_shapes(bits_G: Sequence[int], shape: tuple[int, int], group_size: int) -> list[tuple[int, int, int, int]]:
    """Shape of the planes of every part of a ragged weight, in the order they are stored."""
    lengths = column_blocks(shape[1], group_size)
    row_blocks = -(-shape[0] // ROWS)
    blocks = {b: sum(n for n, of in zip(lengths, bits_G, strict=True) if of == b) for b in set(bits_G)}
    return [(b, row_blocks, blocks[b], ROWS * COLUMNS // 8) for b in sorted(blocks, reverse=True)]


def ragged_bytes(bits_G: Sequence[int], shape: tuple[int, int], group_size: int) -> int:
    """Bytes of the planes of a ragged weight."""
    return sum(b * r * c * n for b, r, c, n in ragged_shapes(bits_G, shape, group_size))


def parts(p: Planes) -> list[RaggedPart]:
    """A ragged weight as its parts; nothing is copied."""
    assert p.bits_G is not None
    found, at = [], 0
    columns = torch.arange(p.shape[1], device=p.planes.device).split(p.group_size)
    for shape in ragged_shapes(p.bits_G, p.shape, p.group_size):
        groups = tuple(g for g, b in enumerate(p.bits_G) if b == shape[0])
        size = shape[0] * shape[1] * shape[2] * shape[3]
        planes = p.planes[at : at + size].view(shape)
        found.append(RaggedPart(shape[0], groups, planes, torch.cat([columns[g] for g in groups])))
        at += size
    return found


def pack_parts(q: QWeight, bits_G: tuple[int, ...]) -> Tensor:
    """Planes of all parts of a ragged weight, uint8 [bytes]."""
    if q.group_size < COLUMNS:
        raise PolybitError(
            f"a width per group cannot be stored for groups of {q.group_size or 'a whole row'}: "
            f"use groups of {COLUMNS} to 256 columns"
        )
    columns = torch.arange(q.shape[1], device=q.codes_OI.device).split(q.group_size)
    codes = []
    for b in sorted(set(bits_G), reverse=True):
        held = torch.cat([columns[g] for g, of in enumerate(bits_G) if of == b])
        codes.append(pack_codes(q.codes_OI[:, held], b).flatten())
    return torch.cat(codes)


def unpack_parts(p: Planes, width: int) -> Tensor:
    """Codes of a ragged weight, uint8 [O, I], each group's in its own width with unread bits zero."""
    codes_OI = torch.zeros(p.shape, dtype=torch.uint8, device=p.planes.device)
    for part in parts(p):
        read = min(width, part.bits)
        held = unpack_codes(part.planes[:read], (p.shape[0], len(part.columns_P)))
        codes_OI[:, part.columns_P] = held << (part.bits - read)
    return codes_OI


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
    """Zero points as uint8, refused when they are not integers of their groups' bits."""
    zero, top_G = q.zero, (1 << q.stored_widths().to(q.zero.device)) - 1
    if not torch.equal(zero, zero.round().clamp_min(0).minimum(top_G.to(zero))):
        raise PolybitError(f"zero points must be integers from 0 to {int(top_G.max())} to be stored")
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
    return ratio_levels(low, high).to(ratio.device)[ratio_index(ratio, low, high)]


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
    if not torch.equal(ratio_levels(low, high).to(index.device)[index], ratio.float()):
        raise PolybitError("the ratios of a QWeight are not storable: round them with planes.storable_ratio first")
    blocked = block_rows(index, torch.uint8)
    return RatioTable(low, high, blocked[..., :8] | (blocked[..., 8:] << 4))


def unpack_ratio(table: RatioTable, rows: int) -> Tensor:
    """The inverse of pack_ratio."""
    if table.index is None:
        return torch.tensor(table.low)
    blocked = torch.cat([table.index & 15, table.index >> 4], dim=-1)
    return ratio_levels(table.low, table.high).to(blocked.device)[unblock_rows(blocked, rows).long()]
