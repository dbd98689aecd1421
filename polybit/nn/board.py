"""The board of a model: all that polybit knows of a model in memory, in one record that hangs on the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from polybit.core.plan import Plan
from polybit.core.records import Rotation
from polybit.core.runtime import PolybitError
from polybit.nn.draw import Rows
from polybit.nn.layer import AdaptedLayer, SwitchableLayer
from polybit.nn.operands import Operands

KEY = "polybit_board"  # in the model's __dict__, past nn.Module's registers: no part of its state


@dataclass(slots=True)
class Board:
    """What is known of one model; copies of the model have copies of it.

    layers: switchable layers by name, empty until they were looked for · presets: named plans · operands: q, k and v of
    every attention layer by its name, None until they were asked for (nn/attention.py) · adapted: layers with adapters,
    and the preset whose adapters are worn (nn/adapters.py) · rows: the precision of every row of the running batch,
    inside `random_precision(per="prompt")` · rotation: how the model was turned (nn/rotation.py) · keeps_packed:
    whether caches are packed (hub/cache.py).
    """

    layers: dict[str, SwitchableLayer] = field(default_factory=dict)
    presets: dict[str, Plan] = field(default_factory=dict)
    operands: dict[str, Operands] | None = None
    adapted: dict[str, AdaptedLayer] = field(default_factory=dict)
    worn: str | None = None
    rows: Rows | None = None
    rotation: Rotation | None = None
    keeps_packed: bool = False

    def converted(self, names: Iterable[str]) -> None:
        """Forget what was known of layers of which `names` were replaced; attention layers and rotation stay."""
        self.layers, self.presets = {}, {}
        for name in names:
            self.adapted.pop(name, None)


def board_of(model: nn.Module) -> Board:
    """The board of a model, quantized or not; made at the first call."""
    found = model.__dict__.get(KEY)
    if found is None:
        found = model.__dict__[KEY] = Board()
    return found


def panel(model: nn.Module) -> Board:
    """The board of a model with its switchable layers on it; refused where there are none."""
    board = board_of(model)
    if not board.layers:
        board.layers = {name: module for name, module in model.named_modules() if isinstance(module, SwitchableLayer)}
        if not board.layers:
            raise PolybitError("the model has no quantized layer: quantize it first, or load a polybit checkpoint")
    return board
