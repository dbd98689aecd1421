"""A matrix too large to hold in float, such as an embedding: rounded some rows at a time, to the same codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from polybit.compress.blocks import parameter_name
from polybit.compress.source import WeightSource
from polybit.core.affine import Grid, QWeight, scale_gain
from polybit.core.planes import ROWS, Planes, block_rows, pack
from polybit.hub.lent_calls import RowReader
from polybit.nn.convert import Target
from polybit.quant.problem import SMALL
from polybit.quant.rtn import rtn
from polybit.quant.scales import settle, span_scale

PART = max(SMALL, 1 << 22)  # weights of a part


def matrix_of(target: Target, source: WeightSource) -> RowReader | None:
    """The weight of a target to read by rows; None when it is there, or has to be lent, as a whole."""
    return source.matrix(parameter_name(target)) if target.kind in ("linear", "embedding", "head") else None


def is_large(matrix: RowReader) -> bool:
    """Whether a matrix had better not be read as a whole."""
    return matrix.shape[0] * matrix.shape[1] > 2 * PART


def parts_of(rows: int, columns: int) -> Iterator[slice]:
    """Blocks of rows of at most PART weights."""
    size = max(1, PART // max(columns, 1))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def q_rows(q: QWeight, part: slice) -> QWeight:
    """Some rows of a quantized weight."""
    if part.stop - part.start == q.shape[0]:
        return q
    cut = lambda x: x[part] if x.ndim == 2 else x  # noqa: E731
    return replace(
        q,
        codes_OI=q.codes_OI[part],
        scale_OG=q.scale_OG[part],
        zero=cut(q.zero),
        ratios={width: cut(ratio) for width, ratio in q.ratios.items()},
    )


def round_rows(matrix: RowReader, grid: Grid) -> Planes:
    """`pack(rtn(weight, None, grid))` of a large matrix, read twice and never there as a whole.

    What rounding knows of the whole weight are two powers of two: of its largest value and of its largest scale. The
    rows that have them go along with every part, so that each is rounded as it would be among all the others. Parts
    have more than SMALL weights, from where on rounding is done in float32.
    """
    rows, columns = matrix.shape
    size = min(rows, -(-(PART + columns) // columns // ROWS) * ROWS + ROWS)
    along_AI = extreme_rows(matrix, grid, size)
    planes = torch.empty(0)
    scales, zeros = [], []
    for start in range(0, rows, size):
        first = min(start, max(0, rows - size) // ROWS * ROWS)  # the last part reaches back, so that none is small
        stop = min(start + size, rows)
        made = rtn(torch.cat([along_AI, matrix.rows(first, stop)]), None, grid)
        q = q_rows(made, slice(len(along_AI) + start - first, made.shape[0]))
        scales.append(q.scale_OG)
        zeros.append(q.zero)
        packed = pack(q).planes
        if not planes.numel():
            planes = packed.new_empty(packed.shape[0], -(-rows // ROWS), *packed.shape[2:])
        planes[:, start // ROWS : start // ROWS + packed.shape[1]] = packed
    scale_OG = settle(torch.cat(scales))
    gain = scale_gain(scale_OG)
    zero = block_rows(torch.cat(zeros), torch.uint8) if zeros[0].ndim else float(zeros[0])
    scale = block_rows((scale_OG / gain).half(), torch.float16)
    return Planes(planes, scale, zero, gain, (rows, columns), grid.group_size)


def extreme_rows(matrix: RowReader, grid: Grid, size: int) -> Tensor:
    """The row with the largest value and the row with the largest range, [2, I]."""
    largest, widest = -1.0, -1.0
    found: list[Tensor] = [torch.empty(0), torch.empty(0)]
    for start in range(0, matrix.shape[0], size):
        part = matrix.rows(start, min(start + size, matrix.shape[0]))
        value_P = part.abs().amax(1)
        if float(value_P.max()) > largest:
            largest, found[0] = float(value_P.max()), part[int(value_P.argmax())].clone()
        range_P = span_scale(part, grid)[0].abs().amax(1)
        if float(range_P.max()) > widest:
            widest, found[1] = float(range_P.max()), part[int(range_P.argmax())].clone()
    return torch.stack(found)
