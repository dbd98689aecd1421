"""Plan: the Precision of every layer of one model – what an allocator computes, what a preset names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from polybit.core.precision import Precision
from polybit.core.runtime import PolybitError


@dataclass(frozen=True, slots=True)
class Plan:
    """A default Precision, and the layers that differ from it (full module names)."""

    default: Precision = field(default_factory=Precision)
    layers: Mapping[str, Precision] = field(default_factory=dict)

    @classmethod
    def uniform(cls, precision: str | int | Precision) -> Plan:
        """The same precision everywhere."""
        return cls(Precision.parse(precision))

    def at(self, layer: str) -> Precision:
        """The precision of one layer."""
        return self.layers.get(layer, self.default)

    def check_names(self, known: Iterable[str]) -> None:
        """Refuse layers the model does not have."""
        unknown = sorted(set(self.layers) - set(known))
        if unknown:
            raise PolybitError(
                f"the plan names {len(unknown)} layer(s) the model does not have, first {unknown[0]!r}: "
                "remove them or use the plan with the model it was made for"
            )

    def mean_bits(self, sizes: Mapping[str, int]) -> float:
        """Mean weight bits over layers, weighted by their number of weights; 16-bit layers count as 16."""
        total = sum(sizes.values())
        return sum(self.at(name).w * n for name, n in sizes.items()) / max(total, 1)

    def to_json(self) -> dict[str, Any]:
        """A readable form a person can edit."""
        return {"default": str(self.default), "layers": {name: str(p) for name, p in self.layers.items()}}

    @classmethod
    def from_json(cls, value: Any) -> Plan:
        """The inverse of to_json; a malformed plan is refused with the offending key."""
        if not isinstance(value, Mapping) or set(value) - {"default", "layers"}:
            raise PolybitError(f"a plan is an object with 'default' and 'layers', got {value!r:.80}")
        layers = value.get("layers", {})
        if not isinstance(layers, Mapping):
            raise PolybitError(f"'layers' of a plan maps layer names to precisions, got {layers!r:.80}")
        return cls(
            Precision.parse(value.get("default", "float")), {str(n): Precision.parse(p) for n, p in layers.items()}
        )
