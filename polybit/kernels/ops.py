"""The operators of this room: `linear` on nested bit planes, registered with torch (polybit::linear, linear_mixed)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear as dense

from polybit.core.planes import Planes, RatioTable, read_widths
from polybit.core.runtime import PolybitError
from polybit.kernels import cpu, reference

Arithmetic = Literal["float", "int8", "int16"]
MODES = {"float": 0, "int8": 8, "int16": 16}
NAMES = {code: name for name, code in MODES.items()}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

SCHEMA = (
    "linear(Tensor x, Tensor planes, Tensor scale, Tensor? zero, Tensor? ratio, Tensor? column_scale, Tensor? bias, "
    "float[] numbers, int rows, int group_size, int width, int mode) -> Tensor"
)


MIXED_SCHEMA = (
    "linear_mixed(Tensor x, Tensor planes, Tensor scale, Tensor? zero, Tensor?[] ratios, Tensor? column_scale, "
    "Tensor? bias, float[] numbers, int[] ratio_widths, int[] widths, int[] stored, int rows, int group_size, "
    "int mode) -> Tensor"
)


def linear(
    x: Tensor,
    planes: Planes,
    width: int | Sequence[int],
    bias: Tensor | None = None,
    *,
    arithmetic: Arithmetic = "float",
) -> Tensor:
    """y = x @ W^T + bias, where W is read at `width` bits from the planes; [..., I] -> [..., O] in x.dtype.

    width: one for all groups of columns, or one per group, clamped to 1..stored. A group that stores fewer bits than a
    common width is read whole. x: float32, bfloat16 or float16. arithmetic: "float" multiplies with the exactly
    decoded weight; "int8" rounds the input to 8 bits per token and group of columns (fast; error about 1 % of the
    output's size); "int16" to 16 bits (nearly as fast when one token is decoded; error below 1e-4). A token holding NaN
    or infinity gives NaN. An input that wants a gradient is always multiplied by the exactly decoded weight. On a GPU
    more than a dozen tokens are not rounded: the weight is decoded in their float type, for torch's dense product.
    Raises PolybitError for a shape, type, device or width that does not fit.
    """
    check(x, planes, width, bias, arithmetic)
    if x.requires_grad and torch.is_grad_enabled():
        return reference.linear(x, planes, width, bias)  # a gradient goes through the exact product
    if planes.bits_G is not None or not isinstance(width, int):
        return linear_mixed(x, planes, width, bias, arithmetic)
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
        MODES[arithmetic],
    )


def linear_mixed(
    x: Tensor, planes: Planes, width: int | Sequence[int], bias: Tensor | None, arithmetic: Arithmetic
) -> Tensor:
    """`linear` of a weight whose groups are stored or read at several widths."""
    tables = sorted(planes.ratios.items())
    zero, fixed = (planes.zero, 0.0) if isinstance(planes.zero, Tensor) else (None, planes.zero)
    return torch.ops.polybit.linear_mixed.default(
        x,
        planes.planes,
        planes.scale,
        zero,
        [table.index for _, table in tables],
        planes.column_scale,
        bias,
        (planes.gain, fixed, *(end for _, table in tables for end in (table.low, table.high))),
        [b for b, _ in tables],
        list(read_widths(planes, width)),
        list(planes.bits_G or ()),
        planes.shape[0],
        planes.group_size,
        MODES[arithmetic],
    )


def decode(planes: Planes, width: int | Sequence[int]) -> Tensor:
    """The weight in float32 [O, I] as seen at `width` bits, bit for bit what `QWeight.dequantize` gives."""
    check_width(planes, width)
    if planes.planes.is_cuda and isinstance(width, int) and fits_gpu(planes) and (kernels := gpu_kernels()):
        with torch.cuda.device_of(planes.planes):
            return kernels[1].decode(planes, width)
    made = cpu.decode(planes, width) if planes.planes.is_cpu else None
    return reference.decode(planes, width) if made is None else made


def best_arithmetic(device: torch.device | None = None) -> Arithmetic:
    """The fastest way to multiply whose error stays below 1e-4 where the weights are (default: in main memory):
    "int16" with kernels for that device, else "float".
    """
    here = device is None or device.type != "cuda"
    return "int16" if (cpu.library() if here else gpu_kernels()) else "float"


def check(x: Tensor, planes: Planes, width: int | Sequence[int], bias: Tensor | None, arithmetic: str) -> None:
    """Refuse what `linear` cannot multiply, saying why."""
    rows, columns = planes.shape
    if x.dtype not in FLOATS:
        raise PolybitError(f"the input of linear is {x.dtype}: convert it to float32, bfloat16 or float16")
    if x.dim() == 0 or x.shape[-1] != columns:
        raise PolybitError(f"the input of linear has shape {tuple(x.shape)}: its last axis must be {columns}")
    check_width(planes, width)
    if x.device != planes.planes.device:
        raise PolybitError(f"the input is on {x.device}, the weight on {planes.planes.device}: move one of them")
    if arithmetic not in MODES:
        raise PolybitError(f"arithmetic {arithmetic!r:.40} is not known: choose 'float', 'int8' or 'int16'")
    if bias is not None and (bias.shape != (rows,) or bias.dtype not in FLOATS):
        raise PolybitError(f"the bias is {bias.dtype} {tuple(bias.shape)}: give a float tensor of shape ({rows},)")
    if bias is not None and bias.device != x.device:
        raise PolybitError(f"the bias is on {bias.device}, the input on {x.device}: move one of them")


def check_width(planes: Planes, width: int | Sequence[int]) -> None:
    """Refuse a width that is not stored, and widths that are not one per group."""
    if not isinstance(width, int):
        read_widths(planes, width)
    elif not 1 <= width <= planes.bits:
        raise PolybitError(f"width {width} is not stored: choose 1 to {planes.bits}")


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
    return reference.linear(x, stored, width, bias, arithmetic=NAMES[mode])


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
    stored = assemble(planes, scale, zero, ratio, column_scale, numbers, (rows, x.shape[-1]), group_size, width)
    return multiply_on_cpu(x, stored, width, bias, mode)


def multiply_on_cpu(x: Tensor, stored: Planes, width: int | Sequence[int], bias: Tensor | None, mode: int) -> Tensor:
    """x times a stored weight by the compiled kernels where they can, else by the slow twin."""
    if mode:
        made = cpu.linear(x, stored, width, bias, mode // 8)
        return reference.linear(x, stored, width, bias, arithmetic=NAMES[mode]) if made is None else made
    y = dense(x.float(), decode(stored, width), None if bias is None else bias.float())
    return y.to(x.dtype)


def mixed_on_cpu(x: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, *rest: Any) -> Tensor:
    """polybit::linear_mixed by the compiled kernels where they can, else by the slow twin."""
    stored, widths, bias, mode = assemble_mixed(x, planes, scale, zero, *rest)
    return multiply_on_cpu(x, stored, widths, bias, mode)


def mixed_by_reference(x: Tensor, planes: Tensor, scale: Tensor, zero: Tensor | None, *rest: Any) -> Tensor:
    """polybit::linear_mixed by the slow twin: every device (a GPU decodes the weight and multiplies densely)."""
    stored, widths, bias, mode = assemble_mixed(x, planes, scale, zero, *rest)
    return reference.linear(x, stored, widths, bias, arithmetic=NAMES[mode])


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
    """polybit::linear on a GPU: few tokens by the Triton kernel, many by decoding and a dense product, which is exact
    in float32 unless torch was told to use TF32; without triton slowly."""
    stored = assemble(planes, scale, zero, ratio, column_scale, numbers, (rows, x.shape[-1]), group_size, width)
    kernels = gpu_kernels() if fits_gpu(stored) and x.numel() else None
    if kernels is None:
        return reference.linear(x, stored, width, bias, arithmetic=NAMES[mode])
    few, many = kernels
    with torch.cuda.device_of(x):  # triton starts kernels on the current device
        if mode and x.numel() <= few.MOST_TOKENS * x.shape[-1]:
            return few.linear(x, stored, width, bias, NAMES[mode])
        return many.linear(x, stored, width, bias, x.dtype if mode else torch.float32)


def fits_gpu(stored: Planes) -> bool:
    """Whether the Triton kernels read this weight: not a width per group, no odd group size, not spread in memory."""
    return stored.bits_G is None and stored.group_size in cpu.GROUPS and stored.planes[0].is_contiguous()


@cache
def gpu_kernels() -> tuple[ModuleType, ModuleType] | None:
    """The Triton kernels for a few tokens and for many, or None where triton is not installed."""
    try:
        from polybit.kernels import triton_decode, triton_gemv
    except ImportError:
        return None
    return triton_gemv, triton_decode


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


def assemble_mixed(
    x: Tensor,
    planes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    ratios: Sequence[Tensor | None],
    column_scale: Tensor | None,
    bias: Tensor | None,
    numbers: Sequence[float],
    ratio_widths: Sequence[int],
    widths: Sequence[int],
    stored: Sequence[int],
    rows: int,
    group_size: int,
    mode: int,
) -> tuple[Planes, Sequence[int], Tensor | None, int]:
    """The Planes, widths, bias and mode that a call of polybit::linear_mixed was taken apart from."""
    gain, fixed, *ends = numbers
    tables = {b: RatioTable(ends[2 * i], ends[2 * i + 1], ratios[i]) for i, b in enumerate(ratio_widths)}
    fixed_or_zero = fixed if zero is None else zero
    bits_G = tuple(stored) or None
    shape = (rows, x.shape[-1])
    whole = Planes(planes, scale, fixed_or_zero, gain, shape, group_size, tables, column_scale, bits_G)
    return whole, widths, bias, mode


def linear_shape(x: Tensor, planes, scale, zero, ratio, column_scale, bias, numbers, rows, *_) -> Tensor:
    """What polybit::linear returns, without computing it."""
    return x.new_empty((*x.shape[:-1], rows))


def mixed_shape(x: Tensor, *rest: Any) -> Tensor:
    """What polybit::linear_mixed returns, without computing it."""
    return x.new_empty((*x.shape[:-1], rest[10]))


LIBRARY = torch.library.Library("polybit", "DEF")
LIBRARY.define(SCHEMA)
LIBRARY.impl("linear", linear_by_reference, "CompositeExplicitAutograd")
LIBRARY.impl("linear", linear_on_cpu, "CPU")
LIBRARY.impl("linear", linear_on_gpu, "CUDA")
torch.library.register_fake("polybit::linear", linear_shape, lib=LIBRARY)
LIBRARY.define(MIXED_SCHEMA)
LIBRARY.impl("linear_mixed", mixed_by_reference, "CompositeExplicitAutograd")
LIBRARY.impl("linear_mixed", mixed_on_cpu, "CPU")
torch.library.register_fake("polybit::linear_mixed", mixed_shape, lib=LIBRARY)
