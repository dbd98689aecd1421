"""How a layer is harmed while its sensitivity is read: its quantizer, and the codes it gives at every width."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from polybit.compress.blocks import outside
from polybit.core.affine import Grid, QWeight, ZeroKind
from polybit.core.parts import load
from polybit.core.records import LayerStats
from polybit.core.runtime import PolybitError
from polybit.nn.convert import Target, targets
from polybit.quant.table import QUANTIZERS


@dataclass(frozen=True, slots=True)
class Quantizing:
    """How a layer is harmed while its sensitivity is read: the quantizer, its widths and its grid."""

    widths: tuple[int, ...]
    method: str = "gptq"
    group_size: int = 64
    zero: ZeroKind = "centre"
    knobs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs_stats(self) -> bool:
        """Whether the quantizer asks calibration for statistics."""
        return QUANTIZERS[self.method].needs_stats

    def grid(self, width: int) -> Grid:
        """The grid of one width."""
        return Grid(width, self.group_size, self.zero)

    def codes(self, weight_OI: Tensor, stats: LayerStats | None) -> dict[int, QWeight]:
        """The layer's codes at every width."""
        quantize = QUANTIZERS[self.method]
        return {width: quantize(weight_OI, stats, self.grid(width), **self.knobs) for width in self.widths}

    def bits(self, targets: Sequence[Target]) -> dict[str, dict[int, float]]:
        """Layer -> width -> effective bits of the whole layer, scales and zero points counted."""
        return {
            t.name: {w: t.size * self.grid(w).bits_per_weight(t.rows, t.columns) for w in self.widths} for t in targets
        }


class Decoded(Mapping[int, Tensor]):
    """width -> weight [O, I], decoded each time it is asked for: codes take a quarter of the memory or less."""

    def __init__(self, codes: Mapping[int, QWeight]) -> None:
        self.codes = codes

    def __getitem__(self, width: int) -> Tensor:
        return self.codes[width].dequantize()

    def __iter__(self) -> Iterator[int]:
        return iter(self.codes)

    def __len__(self) -> int:
        return len(self.codes)


def knobs_of(method: str, **knobs: Any) -> dict[str, Any]:
    """Of these knobs those that the quantizer has."""
    taken = inspect.signature(load(QUANTIZERS[method].function)).parameters
    return {name: value for name, value in knobs.items() if name in taken}


def measurable(model: nn.Module, name: str) -> list[Target]:
    """The weights inside decoder blocks, whose harm can be read one at a time; `name`: the model's, for the refusal."""
    everything = targets(model)
    if not everything:
        raise PolybitError(f"{name} has no weight that can be quantized: only embeddings, norms or unknown layers")
    outer = {target.name for target in outside(model, everything)}
    return [target for target in everything if target.name not in outer]
