"""The slow twin of every operator: plain torch, written to be read; the specification and the fallback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear as dense
from torch.nn.functional import pad

from polybit.core.planes import Planes, read_widths, unpack

LEVELS = {"int8": 127, "int16": 127 * 256}  # largest activation code of a mode; int16 codes are two int8 digits
SMALLEST = 1e-30  # a chunk whose largest activation is below this counts as zero
CHUNK = 128  # widest run of columns that shares an activation scale


def linear(
    x: Tensor,
    planes: Planes,
    width: int | Sequence[int],
    bias: Tensor | None = None,
    *,
    arithmetic: str = "float",
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """y = x @ W_width^T + bias with the weight decoded in full; see `polybit.kernels.ops.linear`.

    With integer arithmetic the input is multiplied by the column scale and rounded first. `precision` is the type
    the product is computed in.
    """
    if arithmetic == "float":
        weight_OI = decode(planes, width)
        inputs = x.to(precision)
    else:
        weight_OI = decode(replace(planes, column_scale=None), width)
        scaled = x.float() if planes.column_scale is None else x.float() * planes.column_scale.float()
        inputs = round_activations(scaled, chunk_of(planes.group_size), LEVELS[arithmetic], precision)
    y = dense(inputs, weight_OI.to(precision), None if bias is None else bias.to(precision))
    return y.to(x.dtype)


def decode(planes: Planes, width: int | Sequence[int]) -> Tensor:
    """The weight in float32 [O, I] as seen at `width` bits, or with a width per group of columns."""
    if isinstance(width, int):
        return unpack(planes, width).dequantize(width)
    widths = read_widths(planes, width)
    return unpack(planes, max(widths)).dequantize(torch.tensor(widths))


def chunk_of(group_size: int) -> int:
    """Columns that share one activation scale: the weight's group, at most 128."""
    return min(group_size or CHUNK, CHUNK)


def round_activations(x: Tensor, chunk: int, levels: int, precision: torch.dtype = torch.float32) -> Tensor:
    """Round to `levels` steps either side of zero, one scale per token and chunk: q = round(x * levels / max|x|).

    Nearest, ties to even, in float32. A chunk that holds NaN or infinity becomes NaN throughout.
    """
    columns = x.shape[-1]
    padded = pad(x.float(), (0, -columns % chunk)).unflatten(-1, (-1, chunk))
    largest = padded.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest >= SMALLEST, torch.tensor(float(levels)) / largest, 0.0)
    scale = torch.where(largest.isfinite(), largest / levels, torch.nan).to(precision)
    rounded = (padded * inverse).round().to(precision) * scale
    return rounded.flatten(-2)[..., :columns]
