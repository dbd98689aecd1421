"""A model whose weights are drawn when they are asked for, to time a block of it before anything is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polybit.hub.lent import LentModel, compute_buffers
from polybit.hub.pieces import PIECE, Place


class DrawnPlace(Place):
    """A tensor of random values: uniform and of the size that keeps outputs as large as inputs; vectors are ones."""

    def __getitem__(self, _everything: Any) -> Tensor:
        """All of it."""
        return self._values(*self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """As many rows."""
        return self._values(stop - start, *self.shape[1:])

    def pieces(self) -> Iterator[Tensor]:
        """As many values."""
        count, step = prod(self.shape), PIECE // self.dtype.itemsize
        return (self._values(min(step, count - at)) for at in range(0, count, step))

    def _values(self, *shape: int) -> Tensor:
        if len(self.shape) < 2:
            return torch.ones(shape, dtype=self.dtype)
        return torch.empty(shape, dtype=self.dtype).uniform_(-1, 1).mul_((3 / self.shape[-1]) ** 0.5)


def drawn_model(name: str, skeleton: Any) -> LentModel:
    """Lends a skeleton drawn weights, in float32."""
    compute_buffers(skeleton)
    places = {key: DrawnPlace(Path(), torch.float32, tuple(p.shape), 0) for key, p in skeleton.named_parameters()}
    return LentModel(name, skeleton, places, None)
