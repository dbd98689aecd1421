"""The door to the compiled CPU kernels: torch tensors in, raw addresses out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from polybit.core.planes import COLUMNS, ROWS, Planes, ragged_bytes, read_widths
from polybit.kernels.extensions import extension

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GROUPS = (0, 32, 64, 128, 256)  # group sizes the compiled kernels read; others take the reference path
BYTES = ROWS * COLUMNS // 8  # of a block in one plane
PLAIN = (Tensor, Parameter)  # types of tensors whose memory is what it says; others only stand for tensors


@cache
def library() -> ModuleType | None:
    """The compiled extension, or None when the package was built without a compiler."""
    return extension("_cpu")


def instruction_sets() -> list[str]:
    """Names of the instruction sets this processor can run, fastest first; empty without the extension."""
    built = library()
    return built.names() if built else []


def fits(p: Planes) -> bool:
    """Whether stored tensors have the very types and sizes the kernels read; anything else must not reach them."""
    rows, columns = p.shape
    blocks, steps = -(-rows // ROWS), -(-columns // COLUMNS)
    groups = -(-columns // p.group_size) if p.group_size else 1
    planes = p.planes
    if p.group_size not in GROUPS or not planes.is_cpu or planes.dtype != torch.uint8:
        return False
    if p.bits_G is None:
        whole = planes.shape[1:] == (blocks, steps, BYTES) and planes.stride()[1:] == (steps * BYTES, BYTES, 1)
    else:
        whole = planes.shape == (ragged_bytes(p.bits_G, p.shape, p.group_size),) and planes.is_contiguous()
    for table in p.ratios.values():
        whole = whole and (table.index is None or is_block(table.index, torch.uint8, (blocks, groups, ROWS // 2)))
    return (
        whole
        and is_block(p.scale, torch.float16, (blocks, groups, ROWS))
        and (not isinstance(p.zero, Tensor) or is_block(p.zero, torch.uint8, (blocks, groups, ROWS)))
        and (p.column_scale is None or is_block(p.column_scale, torch.float16, (columns,)))
    )


def is_block(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is exactly this piece of main memory."""
    return tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.is_cpu


def make_layer(p: Planes, isa: int = 0) -> Any:
    """The compiled layer over the planes' memory, or None where the compiled kernels cannot read it.

    isa: index in instruction_sets.
    """
    built = library() if type(p.planes) in PLAIN else None
    if not built or not fits(p):
        return None
    zero = p.zero if isinstance(p.zero, Tensor) else None
    layer = built.Layer(
        isa, p.planes.data_ptr(), p.planes.stride(0), p.bits, p.scale.data_ptr(),
        0 if zero is None else zero.data_ptr(), 0 if p.column_scale is None else p.column_scale.data_ptr(),
        p.gain, 0.0 if isinstance(p.zero, Tensor) else p.zero, *p.shape, p.group_size, list(p.bits_G or ()),
    )  # fmt: skip
    for width, table in p.ratios.items():
        if width >= p.bits:
            continue  # what is stored is read as it is
        layer.set_ratio(width, 0 if table.index is None else table.index.data_ptr(), table.low, table.high)
    return layer


def reading(layer: Any, p: Planes, width: int | Sequence[int]) -> int:
    """The number by which a compiled layer knows a width, or a width per group."""
    return width if isinstance(width, int) else layer.add(list(read_widths(p, width)))


def multiply(layer: Any, x: Tensor, p: Planes, width: int | Sequence[int], bias: Tensor | None, digits: int) -> Tensor:
    """x times the weight of a compiled layer, with inputs rounded to 1 or 2 int8 digits."""
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], p.shape[0]))
    bias = bias if bias is None else bias.contiguous()
    address, kind = (0, 0) if bias is None else (bias.data_ptr(), TYPES[bias.dtype])
    tokens, number = x.numel() // p.shape[1], width if isinstance(width, int) else reading(layer, p, width)
    layer.multiply(number, digits, tokens, TYPES[x.dtype], x.data_ptr(), y.data_ptr(), address, kind)
    return y


def decode(layer: Any, p: Planes, width: int | Sequence[int]) -> Tensor:
    """The float32 weight [O, I] of a compiled layer, bit for bit the reference's."""
    weight_OI = torch.empty(p.shape)
    layer.decode(reading(layer, p, width), weight_OI.data_ptr())
    return weight_OI
