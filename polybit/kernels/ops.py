"""The operators of this room: `linear` on nested bit planes, registered with torch (polybit::linear), and `decode`.

A call goes: `linear` checks it and takes the Planes apart, because an operator knows tensors and numbers only -> torch
finds the function for the device -> that puts the Planes together and asks kernels/route.py which kernel multiplies.

Two rows of 64 weights, stored once at 4 bits in groups of 32:

    >>> from polybit.core.affine import Grid
    >>> from polybit.core.planes import pack
    >>> from polybit.quant.rtn import rtn
    >>> weight_OI, x = torch.linspace(-1, 1, 128).view(2, 64), torch.linspace(0, 1, 64)[None]
    >>> planes = pack(rtn(weight_OI, None, Grid(4, 32, "group")))
    >>> rounded = lambda y: [round(value, 1) for value in y[0].tolist()]
    >>> rounded(x @ weight_OI.T), rounded(linear(x, planes, 4))
    ([-10.7, 21.6], [-10.7, 21.6])

Narrower widths read fewer of the same planes. A width per group reads the first 32 columns at 4 bits, the others at 2:

    >>> rounded(linear(x, planes, 2)), rounded(linear(x, planes, (4, 2)))
    ([-10.8, 21.3], [-10.6, 21.4])

Whatever the width, a product with exact arithmetic is that with the decoded weight; int8 rounds the input too:

    >>> torch.allclose(linear(x, planes, 2), x @ decode(planes, 2).T)
    True
    >>> float((linear(x, planes, 4, arithmetic="int8") - linear(x, planes, 4)).abs().max()) < 0.1
    True
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack as dispatch_stack
from torch.compiler import is_compiling
from torch.nn.functional import linear as dense

from polybit.core.planes import Planes, read_widths
from polybit.core.runtime import PolybitError
from polybit.kernels import cpu, reference
from polybit.kernels.route import Arithmetic, route

MODES: dict[Arithmetic, int] = {"float": 0, "int8": 8, "int16": 16}
NAMES = {code: name for name, code in MODES.items()}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

SCHEMA = (
    "linear(Tensor x, Tensor? bias, int mode, int[] widths, int[] layout, Tensor planes, Tensor scale, Tensor? zero, "
    "Tensor?[] indices, Tensor? column_scale, float[] numbers) -> Tensor"
)  # what follows `widths` is Planes.apart


def linear(
    x: Tensor,
    planes: Planes,
    width: int | Sequence[int],
    bias: Tensor | None = None,
    *,
    arithmetic: Arithmetic = "float",
) -> Tensor:
    """y = x @ W^T + bias, where W is read at `width` bits from the planes; [..., I] -> [..., O] in x.dtype.

    x: float32, bfloat16 or float16; a token holding NaN or infinity gives NaN.
    width: one for all groups of columns, or one per group, clamped to 1..stored; a group that stores fewer bits than a
    common width is read whole.
    arithmetic: "float" multiplies with the exactly decoded weight; "int8" rounds the input to 8 bits per token and
    group of columns (fast; error about 1 % of the output's size); "int16" to 16 bits (nearly as fast when one token is
    decoded; error below 1e-4).

    An input that wants a gradient is always multiplied by the exactly decoded weight. On a GPU more than a dozen tokens
    are not rounded: the weight is decoded in their float type, for torch's dense product.
    Raises PolybitError for a shape, type, device or width that does not fit.
    """
    check(x, planes, width, bias, arithmetic)
    if route(arithmetic, watched=True, gradient=x.requires_grad and torch.is_grad_enabled()) == "exact":
        return reference.linear(x, planes, width, bias)
    mode, only = MODES[arithmetic], width if isinstance(width, int) and planes.bits_G is None else None
    widths = read_widths(planes, width) if only is None else (only,)
    return torch.ops.polybit.linear.default(x, bias, mode, widths, *planes.apart(only))


def decode(planes: Planes, width: int | Sequence[int]) -> Tensor:
    """The weight in float32 [O, I] as seen at `width` bits, bit for bit what `QWeight.dequantize` gives."""
    check_width(planes, width)
    stored = planes.planes
    layer = cpu.make_layer(planes) if stored.is_cpu else None
    readable = layer is not None or (stored.is_cuda and read_by_gpu(planes, width))
    way = route("float", stored.device.type, readable)
    if way == "decoded":
        return cpu.decode(layer, planes, width)
    if way == "many":
        with torch.cuda.device_of(stored):
            return triton_kernels()[1].decode(planes, width)
    return reference.decode(planes, width)


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


def is_watched(x: Tensor) -> bool:
    """Whether a call must go through torch's dispatcher: somebody wants a gradient, traces, records or counts."""
    return (
        type(x) is not Tensor or (x.requires_grad and torch.is_grad_enabled()) or is_compiling() or dispatch_stack() > 0
    )


def check_width(planes: Planes, width: int | Sequence[int]) -> None:
    """Refuse a width that is not stored, and widths that are not one per group."""
    if not isinstance(width, int):
        read_widths(planes, width)
    elif not 1 <= width <= planes.bits:
        raise PolybitError(f"width {width} is not stored: choose 1 to {planes.bits}")


def by_reference(x: Tensor, bias: Tensor | None, mode: int, widths: Sequence[int], *stored: Any) -> Tensor:
    """polybit::linear by the slow twin, on any device."""
    planes = Planes.together(*stored)
    return reference.linear(x, planes, one_or_each(planes, widths), bias, arithmetic=NAMES[mode])


def on_cpu(x: Tensor, bias: Tensor | None, mode: int, widths: Sequence[int], *stored: Any) -> Tensor:
    """polybit::linear by the compiled kernels where they can, else by the slow twin."""
    planes = Planes.together(*stored)
    width, layer = one_or_each(planes, widths), cpu.make_layer(planes)
    way = route(NAMES[mode], "cpu", layer is not None and x.dtype in FLOATS)
    if way == "compiled":
        return cpu.multiply(layer, x, planes, width, bias, mode // 8)
    if way == "decoded":
        weight_OI = cpu.decode(layer, planes, width)
        return dense(x.float(), weight_OI, None if bias is None else bias.float()).to(x.dtype)
    return reference.linear(x, planes, width, bias, arithmetic=NAMES[mode])


def on_gpu(x: Tensor, bias: Tensor | None, mode: int, widths: Sequence[int], *stored: Any) -> Tensor:
    """polybit::linear on a GPU: few tokens by the Triton kernel, many by decoding and a dense product, which is exact
    in float32 unless torch was told to use TF32; without triton slowly."""
    planes = Planes.together(*stored)
    width: Any = one_or_each(planes, widths)
    way = route(NAMES[mode], "cuda", read_by_gpu(planes, width), x.numel() // planes.shape[1])
    if way == "twin":
        return reference.linear(x, planes, width, bias, arithmetic=NAMES[mode])
    few, many = triton_kernels()
    with torch.cuda.device_of(x):  # triton starts kernels on the current device
        if way == "few":
            return few.linear(x, planes, width, bias, NAMES[mode])
        return many.linear(x, planes, width, bias, x.dtype if mode else torch.float32)


def one_or_each(planes: Planes, widths: Sequence[int]) -> int | Sequence[int]:
    """The width of all groups, or the widths of each, as an operator is told them."""
    return widths[0] if len(widths) == 1 and planes.bits_G is None else widths


def read_by_gpu(planes: Planes, width: int | Sequence[int] = 1) -> bool:
    """Whether the Triton kernels are there and read this weight: no width per group, no odd group size, not spread in
    memory."""
    even = planes.bits_G is None and isinstance(width, int)
    return even and planes.group_size in cpu.GROUPS and planes.planes[0].is_contiguous() and gpu_kernels() is not None


def triton_kernels() -> tuple[ModuleType, ModuleType]:
    """The Triton kernels for a few tokens and for many, where they are known to be there."""
    found = gpu_kernels()
    assert found is not None
    return found


@cache
def gpu_kernels() -> tuple[ModuleType, ModuleType] | None:
    """The Triton kernels for a few tokens and for many, or None where triton is not installed."""
    try:
        from polybit.kernels import triton_decode, triton_gemv
    except ImportError:
        return None
    return triton_gemv, triton_decode


def linear_shape(x: Tensor, bias: Any, mode: int, widths: Sequence[int], layout: Sequence[int], *_: Any) -> Tensor:
    """What polybit::linear returns, without computing it."""
    return x.new_empty((*x.shape[:-1], layout[0]))


LIBRARY = torch.library.Library("polybit", "DEF")
LIBRARY.define(SCHEMA)
LIBRARY.impl("linear", by_reference, "CompositeExplicitAutograd")
LIBRARY.impl("linear", on_cpu, "CPU")
LIBRARY.impl("linear", on_gpu, "CUDA")
torch.library.register_fake("polybit::linear", linear_shape, lib=LIBRARY)
