"""Where the weights of a walk through a model come from: they are all in memory, or lent a block at a time."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from torch import Tensor, nn

from polybit.core.planes import Planes
from polybit.nn.convert import convert


class RowReader(Protocol):
    """A matrix that is read by rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows, in float32."""
        ...


class WeightSource(Protocol):
    """What lends a model its weights: hub.lent.LentModel, or InMemory for a model that has them."""

    def lend(self, path: str) -> AbstractContextManager[None]:
        """While inside, the weights below a module or parameter are there."""
        ...

    def entry(self, blocks: str, first: str) -> AbstractContextManager[None]:
        """While inside, the model can be called up to its blocks, and the first block as well."""
        ...

    def place(self, model: nn.Module, planes: Mapping[str, Planes]) -> None:
        """Put quantized modules in the place of float weights."""
        ...

    def matrix(self, key: str) -> RowReader | None:
        """A weight that had better be read by rows; None when it is there, or can be lent, as a whole."""
        ...


class InMemory:
    """The source of a model that holds all its weights."""

    def lend(self, path: str) -> AbstractContextManager[None]:
        """They are there."""
        return nullcontext()

    def entry(self, blocks: str, first: str) -> AbstractContextManager[None]:
        """They are there."""
        return nullcontext()

    def place(self, model: nn.Module, planes: Mapping[str, Planes]) -> None:
        """In the model itself."""
        convert(model, planes)

    def matrix(self, key: str) -> RowReader | None:
        """Never by rows."""
        return None


IN_MEMORY = InMemory()
