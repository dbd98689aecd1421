"""The operators of this room: `linear` on nested bit planes, registered with torch as polybit::linear."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from polybit.core.planes import Planes, RatioTable
from polybit.core.runtime import PolybitError
from polybit.kernels import reference

Activations = Literal["float", "int8", "int16"]
MODES = {"float": 0, "int8": 8, "int16": 16}
NAMES = {code: name for name, code in MODES.items()}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
WHOLE = RatioTable(1.0, 1.0)  # the ratio of a width that has none

SCHEMA = (
    "linear(Tensor x, Tensor planes, Tensor scale, Tensor? zero, Tensor? ratio, Tensor? column_scale, Tensor? bias, "
    "float[] numbers, int rows, int group_size, int width, int mode) -> Tensor"
)


def linear(
    x: Tensor, planes: Planes, width: int, bias: Tensor | None = None, *, activations: Activations = "float"
) -> Tensor:
    """y = x @ W^T + bias, where W is read at `width` bits from the planes; [..., I] -> [..., O] in x.dtype.

    x: float32, bfloat16 or float16. activations: "float" multiplies with the exactly decoded weight; "int8" rounds the
    input to 8 bits per token and group of columns (fast; error about 1 % of the output's size); "int16" to 16 bits
    (nearly as fast when one token is decoded; error below 1e-4). A token holding NaN or infinity gives NaN.
    Raises PolybitError for a shape, type, device or width that does not fit.
    """
    check(x, planes, width, bias, activations)
    if activations == "float" and x.requires_grad and torch.is_grad_enabled():
        return reference.linear(x, planes, width, bias)
    table = planes.ratios.get(width, WHOLE)
    zero, fixed = (planes.zero, 0.0) if isinstance(planes.zero, Tensor) else (None, planes.zero)
    numbers = (planes.gain, fixed, table.low, table.high)
    return torch.ops.polybit.linear.default(
        x,
        planes.planes,
        planes.scale,
        zero,
        table.index,
        planes.column_scale,
        bias,
        numbers,
        planes.shape[0],
        planes.group_size,
        width,
        MODES[activations],
    )


def decode(planes: Planes, width: int) -> Tensor:
    """The weight in float32 [O, I] as seen at `width` bits, bit for bit what `QWeight.dequantize` gives."""
    return reference.decode(planes, width)


def best_mode() -> Activations:
    """The fastest way to multiply whose error stays below 1e-4: "int16" with compiled kernels, else "float"."""
    return "float"


def check(x: Tensor, planes: Planes, width: int, bias: Tensor | None, activations: str) -> None:
    """Refuse what `linear` cannot multiply, saying why."""
    rows, columns = planes.shape
    if x.dtype not in FLOATS:
        raise PolybitError(f"the input of linear is {x.dtype}: convert it to float32, bfloat16 or float16")
    if x.dim() == 0 or x.shape[-1] != columns:
        raise PolybitError(f"the input of linear has shape {tuple(x.shape)}: its last axis must be {columns}")
    if not 1 <= width <= planes.bits:
        raise PolybitError(f"width {width} is not stored: choose 1 to {planes.bits}")
    if x.device != planes.planes.device:
        raise PolybitError(f"the input is on {x.device}, the weight on {planes.planes.device}: move one of them")
    if activations not in MODES:
        raise PolybitError(f"activations {activations!r} are not known: choose 'float', 'int8' or 'int16'")
    if bias is not None and (bias.shape != (rows,) or bias.dtype not in FLOATS):
        raise PolybitError(f"the bias is {bias.dtype} {tuple(bias.shape)}: give a float tensor of shape ({rows},)")


def linear_by_reference(
    x: Tensor,
    planes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    ratio: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    numbers: Sequence[float],
    rows: int,
    group_size: int,
    width: int,
    mode: int,
) -> Tensor:
    """polybit::linear by the slow twin: every device, every group size."""
    gain, fixed, low, high = numbers
    stored = Planes(
        planes,
        scale,
        fixed if zero is None else zero,
        gain,
        (rows, x.shape[-1]),
        group_size,
        {width: RatioTable(low, high, ratio)},
        column_scale,
    )
    return reference.linear(x, stored, width, bias, activations=NAMES[mode])


def linear_shape(x: Tensor, planes, scale, zero, ratio, column_scale, bias, numbers, rows, *_) -> Tensor:
    """What polybit::linear returns, without computing it."""
    return x.new_empty((*x.shape[:-1], rows))


LIBRARY = torch.library.Library("polybit", "DEF")
LIBRARY.define(SCHEMA)
LIBRARY.impl("linear", linear_by_reference, "CompositeExplicitAutograd")
torch.library.register_fake("polybit::linear", linear_shape, lib=LIBRARY)
