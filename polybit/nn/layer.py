"""What switching asks of a layer: quantized ones (nn/linear.py) and trainable ones (train/latent.py) offer it alike."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from polybit.core.plan import ColumnWidths
from polybit.core.precision import Precision
from polybit.nn.fields import Grouped


@runtime_checkable
class SwitchableLayer(Grouped, Protocol):
    """A layer whose weight can be read at several widths; `precision` and `offsets` say how it is read now."""

    precision: Precision
    offsets: ColumnWidths | None  # what blocks of input columns add to the width

    @property
    def bits(self) -> int:
        """The widest width that is stored."""
        ...

    def set_precision(self, precision: Precision, offsets: ColumnWidths | None = None) -> None:
        """Read the weight so from now on; whatever was kept for another precision is let go."""
        ...


class AdaptedLayer(Protocol):
    """A layer that has low-rank adapters, one per preset at most."""

    def wear(self, preset: str | None) -> None:
        """Use the adapter of a preset; None, or a preset without one: none."""
        ...
