"""Weights handed to the compiled kernels once: what layers call token after token, at little overhead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack as dispatch_stack
from torch.compiler import is_compiling

from polybit.core.planes import Planes
from polybit.kernels import cpu, ops
from polybit.kernels.adapter import Adapter
from polybit.kernels.cpu import TYPES
from polybit.kernels.reference import chunk_of
from polybit.kernels.route import Arithmetic, route

DIGITS = {"int8": 1, "int16": 2}
MOST_READINGS = 64  # widths per group that a layer remembers


class Prepared:
    """`ops.linear` of one weight with less overhead per call: about 4 microseconds in place of 14.

    The planes must stay where they are in memory; make a new one after moving or replacing their tensors. On a GPU one
    token is multiplied past torch's dispatcher and triton's too. Anything else that the compiled kernels do not do
    (tracing, gradients, odd group sizes) goes to `ops.linear`.
    """

    __slots__ = ("bits", "columns", "isa", "layer", "numbers", "on_gpu", "planes", "rows")

    def __init__(self, planes: Planes, isa: int = 0) -> None:
        self.planes, self.isa = planes, isa
        self.rows, self.columns = planes.shape
        self.bits = planes.bits
        self.layer = cpu.make_layer(planes, isa)
        self.on_gpu = gpu_layer(planes) if planes.planes.is_cuda else None
        self.numbers: dict[tuple[int, ...], int] = {}

    def linear(
        self,
        x: Tensor,
        width: int | tuple[int, ...],
        bias: Tensor | None = None,
        arithmetic: Arithmetic = "int16",
        adapter: Adapter | None = None,
    ) -> Tensor:
        """The same as `ops.linear(x, planes, width, bias, arithmetic=arithmetic)`, and the adapter added."""
        if self.on_gpu is not None:
            way = route(arithmetic, "cuda", adapter is None)
            made = self.on_gpu.linear(x, width, bias, arithmetic) if way == "few" else None
            if made is not None:
                return made
        readable = (
            self.layer is not None
            and is_plain(x, self.columns)
            and (type(width) is tuple or (type(width) is int and 1 <= width <= self.bits))
            and (bias is None or self.takes_bias(bias))
            and (adapter is None or (adapter.rows == self.rows and adapter.columns == self.columns))
        )
        if route(arithmetic, "cpu", readable) != "compiled":
            y = ops.linear(x, self.planes, width, bias, arithmetic=arithmetic)
            return y if adapter is None else (y.float() + adapter.product(x)).to(y.dtype)
        number, x = width if type(width) is int else self.number(width), x.contiguous()
        y = x.new_empty((*x.shape[:-1], self.rows))
        self.layer.multiply(
            number,
            DIGITS[arithmetic],
            x.numel() // self.columns,
            TYPES[x.dtype],
            x.data_ptr(),
            y.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else TYPES[bias.dtype],
            None if adapter is None else adapter.for_kernels(),
        )
        return y

    def takes_bias(self, bias: Tensor) -> bool:
        """Whether the compiled kernels read this bias; `ops.linear` refuses the rest with a reason."""
        return bias.dtype in TYPES and bias.shape == (self.rows,) and bias.is_cpu and bias.is_contiguous()

    def number(self, width: int | tuple[int, ...]) -> int:
        """What the compiled layer calls a width, or a width per group; the latter are made once and kept."""
        if type(width) is int:
            return width
        assert isinstance(width, tuple)
        found = self.numbers.get(width)
        if found is None:
            if len(self.numbers) >= MOST_READINGS:  # a search tries many; what it leaves behind is let go
                self.layer, self.numbers = cpu.make_layer(self.planes, self.isa), {}
            found = self.numbers[width] = cpu.reading(self.layer, self.planes, width)
        return found


def gpu_layer(planes: Planes) -> Any:
    """What the Triton kernels make of a weight on a GPU; None where they are not there or do not read it."""
    if ops.gpu_kernels() is None:
        return None
    from polybit.kernels import triton_layer

    return triton_layer.make_layer(planes)


def is_plain(x: Tensor, columns: int) -> bool:
    """Whether an input may go to the compiled kernels past torch's dispatcher."""
    return not (
        type(x) is not Tensor
        or not x.is_cpu
        or x.dtype not in TYPES
        or x.ndim == 0
        or x.shape[-1] != columns
        or (x.requires_grad and torch.is_grad_enabled())
        or is_compiling()
        or dispatch_stack()  # somebody records or counts operators
    )


class Bundle:
    """Several prepared weights that are multiplied by the same input: it is rounded once, and all rows are one job.

    Gives exactly the numbers of separate calls. The weights must agree in columns, group size and column scale
    (`fits`); each has its own width, bias and adapter.
    """

    __slots__ = ("bundle", "layers", "members")

    def __init__(self, members: Sequence[Prepared]) -> None:
        assert Bundle.fits(members)
        self.members = tuple(members)
        self.join()

    def join(self) -> None:
        """Hand the members' layers over as they are now."""
        built = cpu.library()
        assert built is not None
        self.layers = [member.layer for member in self.members]
        self.bundle = built.Bundle(self.layers)

    @staticmethod
    def fits(members: Sequence[Prepared]) -> bool:
        """Whether these weights can round their input together."""
        first = members[0].planes
        scales = [member.planes.column_scale for member in members]
        return all(
            member.layer is not None
            and member.columns == members[0].columns
            and chunk_of(member.planes.group_size) == chunk_of(first.group_size)
            and (scale is None) == (scales[0] is None)
            and (scale is None or scales[0] is None or torch.equal(scale, scales[0]))
            for member, scale in zip(members, scales, strict=True)
        )

    def linear(
        self,
        x: Tensor,
        widths: Sequence[int | tuple[int, ...]],
        biases: Sequence[Tensor | None],
        arithmetic: Arithmetic = "int16",
        adapters: Sequence[Adapter | None] | None = None,
    ) -> list[Tensor]:
        """One output per member: what `Prepared.linear` of each gives."""
        adapters = adapters or (None,) * len(self.members)
        given = list(zip(self.members, widths, biases, adapters, strict=True))
        readable = is_plain(x, self.members[0].columns) and all(
            (isinstance(width, tuple) or 1 <= width <= member.bits)
            and (bias is None or member.takes_bias(bias))
            and (adapter is None or (adapter.rows == member.rows and adapter.columns == member.columns))
            for member, width, bias, adapter in given
        )
        if route(arithmetic, "cpu", readable) != "compiled":
            return [member.linear(x, width, bias, arithmetic, adapter) for member, width, bias, adapter in given]
        numbers = [member.number(width) for member, width, _, _ in given]
        if any(member.layer is not layer for member, layer in zip(self.members, self.layers, strict=True)):
            self.join()
        x = x.contiguous()
        ys = [x.new_empty((*x.shape[:-1], member.rows)) for member in self.members]
        self.bundle.multiply(
            numbers,
            DIGITS[arithmetic],
            x.numel() // x.shape[-1],
            TYPES[x.dtype],
            x.data_ptr(),
            [y.data_ptr() for y in ys],
            [0 if bias is None else bias.data_ptr() for bias in biases],
            [0 if bias is None else TYPES[bias.dtype] for bias in biases],
            [None if adapter is None else adapter.for_kernels() for adapter in adapters],
        )
        return ys


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
