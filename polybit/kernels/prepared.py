"""A weight handed to the compiled kernels once: what a layer calls token after token, at little overhead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from polybit.core.planes import Planes
from polybit.kernels import cpu, ops

DIGITS = {"int8": 1, "int16": 2}


class Prepared:
    """`ops.linear` of one weight with less overhead per call: about 4 microseconds in place of 14.

    The planes must stay where they are in memory; make a new one after moving or replacing their tensors. Anything the
    compiled kernels do not do (other devices, tracing, gradients, odd group sizes) goes to `ops.linear`.
    """

    __slots__ = ("columns", "layer", "planes", "rows")

    def __init__(self, planes: Planes, isa: int = 0) -> None:
        self.planes = planes
        self.rows, self.columns = planes.shape
        self.layer = make_layer(planes, isa)

    def linear(
        self, x: Tensor, width: int, bias: Tensor | None = None, activations: ops.Activations = "int16"
    ) -> Tensor:
        """The same as `ops.linear(x, planes, width, bias, activations=activations)`."""
        if (
            self.layer is None
            or activations not in DIGITS
            or type(x) is not Tensor
            or not x.is_cpu
            or x.dtype not in cpu.TYPES
            or x.ndim == 0
            or x.shape[-1] != self.columns
            or (bias is not None and (bias.dtype not in cpu.TYPES or bias.shape != (self.rows,)))
            or not 1 <= width <= self.planes.bits
            or (x.requires_grad and torch.is_grad_enabled())
            or torch.compiler.is_compiling()
            or torch._C._len_torch_dispatch_stack()  # somebody records or counts operators
        ):
            return ops.linear(x, self.planes, width, bias, activations=activations)
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self.rows))
        self.layer.multiply(
            width,
            DIGITS[activations],
            x.numel() // self.columns,
            cpu.TYPES[x.dtype],
            x.data_ptr(),
            y.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else cpu.TYPES[bias.dtype],
        )
        return y


class Holder:
    """Keeps the Prepared of a weight whose tensors may move; copies and pickles of it start empty."""

    __slots__ = ("places", "prepared")

    def __init__(self) -> None:
        self.places: list[int] = []
        self.prepared: Prepared | None = None

    def __reduce__(self) -> tuple[type[Holder], tuple[()]]:
        return Holder, ()

    def get(self, tensors: Iterable[Tensor | None], planes: Callable[[], Planes]) -> Prepared:
        """The Prepared of `planes()`, made anew when one of `tensors` is no longer where it was."""
        places = [0 if t is None else t.data_ptr() for t in tensors]
        if self.prepared is None or self.places != places:
            self.places, self.prepared = places, Prepared(planes())
        return self.prepared


def make_layer(planes: Planes, isa: int) -> Any:
    """The compiled layer over the planes' memory, or None where the compiled kernels cannot read it."""
    zero = planes.zero if isinstance(planes.zero, Tensor) else None
    parts = (planes.planes, planes.scale, zero)
    tables = [table.index for table in planes.ratios.values()] or [None]
    built = cpu.library() if planes.planes.is_cpu and type(planes.planes.data) is Tensor else None
    if not built or not all(
        cpu.fits(*parts, index, planes.column_scale, *planes.shape, planes.group_size) for index in tables
    ):
        return None
    layer = built.Layer(
        isa,
        planes.planes.data_ptr(),
        planes.planes.stride(0),
        planes.bits,
        planes.scale.data_ptr(),
        0 if zero is None else zero.data_ptr(),
        0 if planes.column_scale is None else planes.column_scale.data_ptr(),
        planes.gain,
        0.0 if zero is not None else planes.zero,
        *planes.shape,
        planes.group_size,
    )
    for width, table in planes.ratios.items():
        layer.set_ratio(width, 0 if table.index is None else table.index.data_ptr(), table.low, table.high)
    return layer
