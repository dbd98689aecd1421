"""Where the weights of a walk through a model come from: they are all in memory, or lent a block at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from polybit.compress.states import Room
from polybit.core.planes import Planes
from polybit.hub.lent import open_lent
from polybit.hub.lent_calls import RowReader
from polybit.hub.load import load_float
from polybit.nn.convert import convert


class WeightSource(Protocol):
    """What lends a model its weights: hub.lent.LentModel, or InMemory for a model that has them."""

    def lend(self, path: str) -> AbstractContextManager[None]:
        """While inside, the weights below a module or parameter are there."""
        ...

    def entry(self, blocks: str, first: str) -> AbstractContextManager[None]:
        """While inside, the model can be called up to its blocks, and the first block as well."""
        ...

    def calls(self, blocks: str) -> AbstractContextManager[None]:
        """While inside, the model can be called as a whole."""
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

    def calls(self, blocks: str) -> AbstractContextManager[None]:
        """They are there."""
        return nullcontext()

    def place(self, model: nn.Module, planes: Mapping[str, Planes]) -> None:
        """In the model itself."""
        convert(model, planes)

    def matrix(self, key: str) -> RowReader | None:
        """Never by rows."""
        return None


IN_MEMORY = InMemory()


@dataclass(frozen=True, slots=True)
class SourceName:
    """A float model by its name, which a worker opens for itself.

    lent: a block of weights at a time · states: bytes of hidden states in memory, None = all of them
    """

    name: str
    trust_remote_code: bool = False
    lent: bool = False
    states: int | None = None

    def open(self) -> tuple[nn.Module, dict[str, Any]]:
        """The model, and the `source` and `room` a walk through its blocks is told."""
        lent = open_lent(self.name, trust_remote_code=self.trust_remote_code) if self.lent else None
        if lent is None:
            model, _ = load_float(self.name, trust_remote_code=self.trust_remote_code)
            return model.requires_grad_(False), {"source": IN_MEMORY, "room": None}
        return lent.model, {"source": lent, "room": Room(self.states, Path(tempfile.gettempdir()))}
