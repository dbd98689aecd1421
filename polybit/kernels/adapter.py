"""A low-rank part beside a stored weight, added in the same call as the product: y += scale * up (down x)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from polybit.core.affine import scale_gain
from polybit.core.planes import COLUMNS, block_rows
from polybit.core.runtime import PolybitError
from polybit.kernels import cpu


class Adapter:
    """The two factors of a low-rank part (LoRA, arXiv 2106.09685), outside the quantizer.

    down_RI [rank, inputs], up_OR [outputs, rank]: held by reference, so that an optimizer may move them. The compiled
    kernels read them rounded to 16-bit floats times a power of two each (relative error 2^-11). An adapter sees the
    layer's input as it comes, before activations are rounded.
    """

    __slots__ = ("columns", "down_RI", "packed", "rank", "rows", "scale", "stamp", "up_OR")

    def __init__(self, down_RI: Tensor, up_OR: Tensor, scale: float = 1.0) -> None:
        if down_RI.ndim != 2 or up_OR.ndim != 2 or up_OR.shape[1] != down_RI.shape[0] or not down_RI.numel():
            raise PolybitError(
                f"the factors of an adapter have shapes {tuple(down_RI.shape)} and {tuple(up_OR.shape)}: "
                "give down [rank, inputs] and up [outputs, rank]"
            )
        if not (down_RI.isfinite().all() and up_OR.isfinite().all()):
            raise PolybitError("an adapter holds NaN or infinity: train it again")
        self.rank, self.columns = down_RI.shape
        self.rows = up_OR.shape[0]
        self.down_RI, self.up_OR, self.scale = down_RI, up_OR, float(scale)
        self.stamp: tuple[int, ...] = ()
        self.packed: Any = None

    def __reduce__(self) -> tuple[type[Adapter], tuple[Tensor, Tensor, float]]:
        return Adapter, (self.down_RI, self.up_OR, self.scale)

    def product(self, x: Tensor) -> Tensor:
        """scale * up (down x) in float32, what is added to the layer's product: the slow twin of the kernels."""
        down_RI, up_OR = (factor.to(x.device).float() for factor in (self.down_RI, self.up_OR))
        return linear(linear(x.float(), down_RI), up_OR) * self.scale

    def trains(self) -> bool:
        """Whether a gradient is wanted now."""
        return torch.is_grad_enabled() and (self.down_RI.requires_grad or self.up_OR.requires_grad)

    def for_kernels(self) -> Any:
        """The compiled kernels' view of the factors, made anew when they have changed."""
        stamp = (self.down_RI.data_ptr(), self.up_OR.data_ptr(), version(self.down_RI), version(self.up_OR))
        if self.packed is None or self.stamp != stamp:
            built = cpu.library()
            assert built is not None
            down, up, gain = pack_factors(self.down_RI, self.up_OR)
            compiled = built.Adapter(down.data_ptr(), up.data_ptr(), self.rank, self.scale * gain)
            self.stamp, self.packed = stamp, (compiled, down, up)
        return self.packed[0]

    def nbytes(self) -> int:
        """Bytes the kernels read per call."""
        return 2 * self.rank * (self.columns + self.rows)


def pack_factors(down_RI: Tensor, up_OR: Tensor) -> tuple[Tensor, Tensor, float]:
    """Both factors in 16-bit floats as the kernels read them, and the power of two that was taken out.

    down: [R, I padded to whole blocks of columns] · up: [O/16, R, 16].
    """
    gains = scale_gain(down_RI), scale_gain(up_OR)
    down = (down_RI.detach().float() / gains[0]).half().cpu()
    up = (up_OR.detach().float() / gains[1]).half().cpu()
    return pad(down, (0, -down.shape[1] % COLUMNS)).contiguous(), block_rows(up, torch.float16), gains[0] * gains[1]


def version(tensor: Tensor) -> int:
    """Changes when a tensor is written to; tensors made in inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version
