"""One weight times one token on a GPU, called from Python at little overhead: launches worked out once and repeated.

Triton works out from 30 arguments at every call which build of a kernel they need; here that is remembered per width,
float type and arithmetic, and a call sets three addresses.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from polybit.core.planes import COLUMNS, Planes
from polybit.kernels import ops
from polybit.kernels.triton_gemv import launch, tile_of

ALL_ARGUMENTS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 3)  # before, constants were left out
CONSTANTS = 19  # the first argument of `gemv` that is one
X, BIAS, Y = 0, 7, 8  # places of the arguments that change


class LaunchedLayer:
    """A weight that must stay where it is in memory."""

    __slots__ = ("columns", "device", "launches", "planes", "rows")

    def __init__(self, planes: Planes) -> None:
        self.planes, self.launches = planes, {}  # type: ignore[var-annotated]
        self.rows, self.columns = planes.shape
        self.device = planes.planes.get_device()

    def linear(self, x: Tensor, width: Any, bias: Tensor | None, arithmetic: str) -> Tensor | None:
        """`ops.linear` of one token, or None for what this does not do: tracing, gradients, other inputs and biases."""
        if (
            x.numel() != self.columns
            or x.shape[-1] != self.columns
            or x.get_device() != self.device
            or not x.is_contiguous()
            or ops.is_watched(x)
            or torch._C._cuda_getDevice() != self.device
            or not (bias is None or self.takes_bias(bias))
        ):
            return None
        x_at, bias_at = x.data_ptr(), 0 if bias is None else bias.data_ptr()
        if (x_at | bias_at) % 16:
            return None  # another build of the kernel
        key = (width, arithmetic, x.dtype, None if bias is None else bias.dtype)
        found = self.launches.get(key)
        if found is None:
            return self.first(key, x, bias)
        kernel, rows, function, metadata, arguments = found
        y = x.new_empty((*x.shape[:-1], self.rows))
        arguments = arguments.copy()
        arguments[X], arguments[BIAS], arguments[Y] = x_at, bias_at, y.data_ptr()
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        kernel(rows, 1, 1, stream, function, metadata, None, None, None, *arguments)
        return y

    def takes_bias(self, bias: Tensor) -> bool:
        """Whether the kernel reads this bias; `ops.linear` refuses the rest with a reason."""
        good = bias.dtype in ops.FLOATS and bias.shape == (self.rows,)
        return good and bias.get_device() == self.device and bias.is_contiguous()

    def first(self, key: tuple[Any, ...], x: Tensor, bias: Tensor | None) -> Tensor | None:
        """The first call of its kind, through triton, which is remembered."""
        width, arithmetic, dtype, _ = key
        if arithmetic not in ("int8", "int16") or dtype not in ops.FLOATS:
            return None
        if type(width) is not int or not 1 <= width <= self.planes.bits:
            return None
        y = x.new_empty((*x.shape[:-1], self.rows))
        scale = x if self.planes.column_scale is None else self.planes.column_scale
        tile = tile_of(-(-self.columns // COLUMNS), 1)
        built, grid, arguments = launch(x, scale, x, self.planes, width, bias, y, 1, arithmetic, tile, True)
        kept = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        kept = kept if ALL_ARGUMENTS else kept[:CONSTANTS]
        self.launches[key] = (built.run, grid[0], built.function, built.packed_metadata, kept)
        return y


def make_layer(planes: Planes) -> LaunchedLayer | None:
    """The LaunchedLayer of a weight on a GPU, or None where its kernel does not read it."""
    return LaunchedLayer(planes) if planes.planes.is_cuda and ops.read_by_gpu(planes) else None
