"""Plan: the Precision of every layer of one model – what an allocator computes, what a preset names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from polybit.core.precision import FLOAT, Precision
from polybit.core.runtime import PolybitError

PLAN = "plan"  # preset of a checkpoint that was made by a plan
LEAST_GROUP = 32  # columns of the smallest group that can have a width of its own in a file (core/planes.py)
LARGEST_OFFSET = 4  # bits a block of columns may differ from its layer
KEYS = {"default", "layers", "columns"}


@dataclass(frozen=True, slots=True)
class ColumnWidths:
    """Widths inside one layer: for every `block` input columns an offset to the layer's width, 0 = the layer's own.

    Block j covers columns j * block to (j + 1) * block - 1 of all output rows; a block is a multiple of the group size
    the layer is quantized with. A width that the offset would carry below 1 or above what is stored stays there.
    """

    block: int
    offsets: tuple[int, ...]

    def __post_init__(self) -> None:
        if not is_whole(self.block) or self.block < 1:
            raise PolybitError(f"'block' of column widths is {self.block!r:.40}: give a number of columns, as in 128")
        bad = [v for v in self.offsets if not is_whole(v) or abs(v) > LARGEST_OFFSET]
        if bad or not self.offsets:
            raise PolybitError(
                f"'offsets' of column widths hold {bad[0] if bad else 'nothing'!r:.40}: "
                f"give one whole number from {-LARGEST_OFFSET} to {LARGEST_OFFSET} per block, as in [0, 1, -1]"
            )

    def block_widths(self, width: int, most: int = 8) -> tuple[int, ...]:
        """Width of every block in a layer of `width` bits, within 1..most."""
        return tuple(min(max(width + offset, 1), most) for offset in self.offsets)

    def group_widths(self, width: int, columns: int, group_size: int, *, most: int = 8) -> tuple[int, ...]:
        """Width of every group of a layer of `width` bits and `columns` input columns; a misfit is refused."""
        if not group_size or self.block % group_size:
            size = group_size or "a whole row"
            raise PolybitError(
                f"column blocks of {self.block} do not fit groups of {size}: "
                "use a group size that divides the block, as in --group-size 32 for blocks of 32, 64 or 128"
            )
        blocks = -(-columns // self.block)
        if len(self.offsets) != blocks:
            raise PolybitError(
                f"{len(self.offsets)} column offsets were given for {columns} input columns in blocks of {self.block}: "
                f"give {blocks}"
            )
        each = min(self.block, columns + group_size) // group_size  # a block may be wider than the layer, by far
        widths = [b for b in self.block_widths(width, most) for _ in range(each)]
        return tuple(widths[: -(-columns // group_size)])

    def mean(self, width: int, columns: int | None = None, *, most: int = 8) -> float:
        """Mean bits of a layer of `width` bits, every column counted once; without `columns` all blocks count equal."""
        widths = self.block_widths(width, most)
        if columns is None:
            return sum(widths) / len(widths)
        lengths = [max(0, min(self.block, columns - start * self.block)) for start in range(len(widths))]
        return sum(b * n for b, n in zip(widths, lengths, strict=True)) / max(sum(lengths), 1)

    def to_json(self) -> dict[str, Any]:
        """A readable form a person can edit."""
        return {"block": self.block, "offsets": list(self.offsets)}

    @classmethod
    def from_json(cls, layer: str, value: Any) -> ColumnWidths:
        """The inverse of to_json; what is malformed is named with its layer."""
        if not isinstance(value, Mapping) or set(value) != {"block", "offsets"} or not is_list(value["offsets"]):
            raise PolybitError(
                f"'columns' of layer {layer!r:.120} must be an object such as "
                f'{{"block": 128, "offsets": [0, 1, -1]}}, got {value!r:.80}'
            )
        try:
            return cls(value["block"], tuple(value["offsets"]))
        except PolybitError as error:
            raise PolybitError(f"layer {layer!r:.120}: {error}") from None


@dataclass(frozen=True, slots=True)
class Plan:
    """A default Precision, the layers that differ from it (full module names), and widths inside layers (`columns`)."""

    default: Precision = field(default_factory=Precision)
    layers: Mapping[str, Precision] = field(default_factory=dict)
    columns: Mapping[str, ColumnWidths] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.columns:
            if self.at(name).w == FLOAT:
                raise PolybitError(
                    f"the plan gives column widths to layer {name!r:.120}, which it leaves in float: "
                    "give the layer a width such as w4, or remove it from 'columns'"
                )

    def __str__(self) -> str:
        """As people say it: w4, or how many layers have what, as in "w4, 3 layers w6, widths inside 2 layers"."""
        counts = Counter(str(precision) for precision in self.layers.values() if precision != self.default)
        parts = [f"{n} {'layer' if n == 1 else 'layers'} {precision}" for precision, n in counts.most_common()]
        inside = [f"widths inside {len(self.columns)} {'layer' if len(self.columns) == 1 else 'layers'}"]
        return ", ".join([str(self.default), *parts, *(inside if self.columns else [])])

    @classmethod
    def uniform(cls, precision: str | int | Precision) -> Plan:
        """The same precision everywhere."""
        return cls(Precision.parse(precision))

    def at(self, layer: str) -> Precision:
        """The precision of one layer."""
        return self.layers.get(layer, self.default)

    def group_widths(self, layer: str, columns: int, group_size: int) -> tuple[int, ...] | None:
        """Width of every group inside a layer, None where the plan gives it one width; named errors (ColumnWidths)."""
        inside = self.columns.get(layer)
        if inside is None:
            return None
        try:
            return inside.group_widths(self.at(layer).w, columns, group_size)
        except PolybitError as error:
            raise PolybitError(f"layer {layer!r:.120} of the plan: {error}") from None

    def check_names(self, known: Iterable[str]) -> None:
        """Refuse layers the model does not have."""
        unknown = sorted({*self.layers, *self.columns} - set(known))
        if unknown:
            raise PolybitError(
                f"the plan names {len(unknown)} layer(s) the model does not have, first {unknown[0]!r:.120}: "
                "remove them or use the plan with the model it was made for"
            )

    def mean_bits(self, sizes: Mapping[str, int], columns: Mapping[str, int] | None = None) -> float:
        """Mean weight bits over layers, weighted by their number of weights; 16-bit layers count as 16.

        sizes: weights per layer · columns: input columns per layer, needed only where column blocks do not divide them.
        """
        total = sum(sizes.values())
        return sum(self.bits_of(name, (columns or {}).get(name)) * n for name, n in sizes.items()) / max(total, 1)

    def bits_of(self, layer: str, columns: int | None = None) -> float:
        """Mean weight bits of one layer."""
        inside = self.columns.get(layer)
        return float(self.at(layer).w) if inside is None else inside.mean(self.at(layer).w, columns)

    def to_json(self) -> dict[str, Any]:
        """A readable form a person can edit."""
        value: dict[str, Any] = {
            "default": str(self.default),
            "layers": {name: str(p) for name, p in self.layers.items()},
        }
        if self.columns:
            value["columns"] = {name: inside.to_json() for name, inside in self.columns.items()}
        return value

    @classmethod
    def from_json(cls, value: Any) -> Plan:
        """The inverse of to_json; a malformed plan is refused with the offending key."""
        if not isinstance(value, Mapping) or set(value) - KEYS:
            raise PolybitError(f"a plan is an object with 'default', 'layers' and 'columns', got {value!r:.80}")
        layers, columns = value.get("layers", {}), value.get("columns", {})
        if not isinstance(layers, Mapping):
            raise PolybitError(f"'layers' of a plan maps layer names to precisions, got {layers!r:.80}")
        if not isinstance(columns, Mapping):
            raise PolybitError(f"'columns' of a plan maps layer names to blocks and offsets, got {columns!r:.80}")
        return cls(
            Precision.parse(value.get("default", "float")),
            {str(n): Precision.parse(p) for n, p in layers.items()},
            {str(n): ColumnWidths.from_json(str(n), c) for n, c in columns.items()},
        )


def largest_width(plan: Plan) -> int:
    """The widest layer or block of columns of a plan."""
    plain = [precision.w for precision in (plan.default, *plan.layers.values()) if precision.w != FLOAT]
    inside = [max(c.block_widths(plan.at(name).w)) for name, c in plan.columns.items()]
    if not plain:
        raise PolybitError("the plan leaves every layer in float: give layers or the default a width such as w4")
    return max(plain + inside)


def is_whole(value: Any) -> bool:
    """True for an integer, not for true or false."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_list(value: Any) -> bool:
    """True for a JSON list."""
    return isinstance(value, list | tuple)
