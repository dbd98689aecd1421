"""The door to the compiled CPU kernels: torch tensors in, raw addresses out."""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from polybit.core.planes import COLUMNS, ROWS, Planes, RatioTable

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GROUPS = (0, 32, 64, 128, 256)  # group sizes the compiled kernels read; others take the reference path
BYTES = ROWS * COLUMNS // 8  # of a block in one plane
WHOLE = RatioTable(1.0, 1.0)  # the ratio of a width that has none


@cache
def library() -> ModuleType | None:
    """The compiled extension, or None – said once, loudly – when the package was built without a compiler."""
    try:
        from polybit.kernels import _cpu  # type: ignore[attr-defined]
    except ImportError as error:
        warnings.warn(
            f"polybit runs without its compiled CPU kernels ({error}), many times slower: "
            "install a C++ compiler and reinstall polybit, or use a wheel",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return _cpu


def instruction_sets() -> list[str]:
    """Names of the instruction sets this processor can run, fastest first; empty without the extension."""
    built = library()
    return built.names() if built else []


def fits(
    planes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    ratio: Tensor | None,
    column_scale: Tensor | None,
    rows: int,
    columns: int,
    group_size: int,
) -> bool:
    """Whether stored tensors have the very types and sizes the kernels read; anything else must not reach them."""
    if group_size not in GROUPS:
        return False
    blocks, steps = -(-rows // ROWS), -(-columns // COLUMNS)
    groups = -(-columns // group_size) if group_size else 1
    return (
        planes.dtype == torch.uint8
        and planes.shape[1:] == (blocks, steps, BYTES)
        and planes.stride()[1:] == (steps * BYTES, BYTES, 1)
        and planes.is_cpu
        and is_block(scale, torch.float16, (blocks, groups, ROWS))
        and (zero is None or is_block(zero, torch.uint8, (blocks, groups, ROWS)))
        and (ratio is None or is_block(ratio, torch.uint8, (blocks, groups, ROWS // 2)))
        and (column_scale is None or is_block(column_scale, torch.float16, (columns,)))
    )


def is_block(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is exactly this piece of main memory."""
    return tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.is_cpu


def linear(
    x: Tensor,
    planes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    ratio: Tensor | None,
    column_scale: Tensor | None,
    bias: Tensor | None,
    numbers: Any,
    rows: int,
    group_size: int,
    width: int,
    mode: int,
    isa: int = 0,
) -> Tensor:
    """polybit::linear with integer activations, on tensors that `fits` accepted; isa = index in instruction_sets."""
    built = library()
    assert built is not None
    x = x.contiguous()
    columns = x.shape[-1]
    tokens = x.numel() // columns
    y = x.new_empty((*x.shape[:-1], rows))
    gain, fixed, low, high = numbers
    built.linear(
        isa, x.data_ptr(), TYPES[x.dtype], tokens, mode // 8, y.data_ptr(),
        0 if bias is None else bias.data_ptr(), 0 if bias is None else TYPES[bias.dtype],
        planes.data_ptr(), planes.stride(0), planes.shape[0],
        scale.data_ptr(), 0 if zero is None else zero.data_ptr(), 0 if ratio is None else ratio.data_ptr(),
        0 if column_scale is None else column_scale.data_ptr(),
        gain, fixed, low, high, rows, columns, group_size, width,
    )  # fmt: skip
    return y


def decode(p: Planes, width: int, isa: int = 0) -> Tensor:
    """The float32 weight [O, I] of planes that `fits` accepted, bit for bit the reference's."""
    built = library()
    assert built is not None
    table = p.ratios.get(width, WHOLE)
    zero, fixed = (p.zero.data_ptr(), 0.0) if isinstance(p.zero, Tensor) else (0, p.zero)
    rows, columns = p.shape
    weight_OI = torch.empty(rows, columns)
    built.decode(
        isa, weight_OI.data_ptr(), p.planes.data_ptr(), p.planes.stride(0), p.bits, p.scale.data_ptr(), zero,
        0 if table.index is None else table.index.data_ptr(),
        0 if p.column_scale is None else p.column_scale.data_ptr(),
        p.gain, fixed, table.low, table.high, rows, columns, p.group_size, width,
    )  # fmt: skip
    return weight_OI
