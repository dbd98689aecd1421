"""The operators of this room: `linear` on nested bit planes, registered with torch as polybit::linear."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear as dense

from polybit.core.planes import Planes, RatioTable
from polybit.core.runtime import PolybitError
from polybit.kernels import cpu, reference

Activations = Literal["float", "int8", "int16"]
MODES = {"float": 0, "int8": 8, "int16": 16}
NAMES = {code: name for name, code in MODES.items()}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

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
    (nearly as fast when one token is decoded; error below 1e-4). A token holding NaN or infinity gives NaN. An input
    that wants a gradient is always multiplied by the exactly decoded weight.
    Raises PolybitError for a shape, type, device or width that does not fit.
    """
    check(x, planes, width, bias, activations)
    if x.requires_grad and torch.is_grad_enabled():
        return reference.linear(x, planes, width, bias)  # a gradient goes through the exact product
    table = planes.ratios.get(width, cpu.WHOLE)
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
    if not 1 <= width <= planes.bits:
        raise PolybitError(f"width {width} is not stored: choose 1 to {planes.bits}")
    index = planes.ratios.get(width, cpu.WHOLE).index
    zero = planes.zero if isinstance(planes.zero, Tensor) else None
    parts = (planes.planes, planes.scale, zero, index, planes.column_scale)
    if planes.planes.is_cpu and cpu.library() and cpu.fits(*parts, *planes.shape, planes.group_size):
        return cpu.decode(planes, width)
    return reference.decode(planes, width)


def best_mode() -> Activations:
    """The fastest way to multiply whose error stays below 1e-4: "int16" with compiled kernels, else "float"."""
    return "int16" if cpu.library() else "float"


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
    stored = assemble(planes, scale, zero, ratio, column_scale, numbers, (rows, x.shape[-1]), group_size, width)
    return reference.linear(x, stored, width, bias, activations=NAMES[mode])


def linear_on_cpu(
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
    """polybit::linear by the compiled kernels where they can, else by the slow twin."""
    columns = x.shape[-1]
    if mode and cpu.library() and cpu.fits(planes, scale, zero, ratio, column_scale, rows, columns, group_size):
        bias = bias if bias is None else bias.contiguous()
        return cpu.linear(x, planes, scale, zero, ratio, column_scale, bias, numbers, rows, group_size, width, mode)
    stored = assemble(planes, scale, zero, ratio, column_scale, numbers, (rows, columns), group_size, width)
    if mode:
        return reference.linear(x, stored, width, bias, activations=NAMES[mode])
    y = dense(x.float(), decode(stored, width), None if bias is None else bias.float())
    return y.to(x.dtype)


def linear_on_gpu(
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
    """polybit::linear on a GPU: by the Triton kernels for few and for many tokens, without triton slowly."""
    stored = assemble(planes, scale, zero, ratio, column_scale, numbers, (rows, x.shape[-1]), group_size, width)
    kernels = gpu_kernels() if mode and group_size in cpu.GROUPS and planes.is_contiguous() else None
    if kernels is not None and x.numel():
        few, many = kernels
        kernel = few if x.numel() <= few.MOST_TOKENS * x.shape[-1] else many
        return kernel.linear(x, stored, width, bias, NAMES[mode])
    return reference.linear(x, stored, width, bias, activations=NAMES[mode])


@cache
def gpu_kernels() -> tuple[ModuleType, ModuleType] | None:
    """The Triton kernels for a few tokens and for many, or None where triton is not installed."""
    try:
        from polybit.kernels import triton_gemm, triton_gemv
    except ImportError:
        return None
    return triton_gemv, triton_gemm


def assemble(
    planes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    ratio: Tensor | None,
    column_scale: Tensor | None,
    numbers: Sequence[float],
    shape: tuple[int, int],
    group_size: int,
    width: int,
) -> Planes:
    """The Planes an operator call was taken apart from, as far as `width` needs them."""
    gain, fixed, low, high = numbers
    ratios = {width: RatioTable(low, high, ratio)}
    return Planes(planes, scale, fixed if zero is None else zero, gain, shape, group_size, ratios, column_scale)


def linear_shape(x: Tensor, planes, scale, zero, ratio, column_scale, bias, numbers, rows, *_) -> Tensor:
    """What polybit::linear returns, without computing it."""
    return x.new_empty((*x.shape[:-1], rows))


LIBRARY = torch.library.Library("polybit", "DEF")
LIBRARY.define(SCHEMA)
LIBRARY.impl("linear", linear_by_reference, "CompositeExplicitAutograd")
LIBRARY.impl("linear", linear_on_cpu, "CPU")
LIBRARY.impl("linear", linear_on_gpu, "CUDA")
torch.library.register_fake("polybit::linear", linear_shape, lib=LIBRARY)
