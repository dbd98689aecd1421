"""The tensors and numbers that make up a stored weight: what a quantized module holds and a file keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import frexp
from typing import Any, Protocol

import torch
from torch import Tensor

from polybit.core.plan import Plan
from polybit.core.planes import COLUMNS, ROWS, Planes, RatioTable, ragged_bytes
from polybit.core.runtime import PolybitError

KEYS = {"shape", "bits", "group_size", "zero", "gain", "ratios", "column_scale"}
LARGEST = 1 << 31  # no dimension of a real weight reaches this
OPTIONAL = {"group_bits"}
GROUP_SIZES = (0, 16, 32, 64, 128, 256)


class Grouped(Protocol):
    """Whatever holds a weight whose columns share scales by groups."""

    @property
    def columns(self) -> int:
        """Number of inputs."""
        ...

    @property
    def group_size(self) -> int:
        """Columns of a group; 0 = a whole row, which cannot have widths inside."""
        ...


@dataclass(frozen=True, slots=True)
class Fields:
    """The numbers of one stored weight; together with its tensors they are its Planes.

    shape: (rows, columns) · zero: one number for all groups, or None when each group stores its own · ratios: width ->
    (low, high, True when an index per group is stored) · column_scale: True when one is stored · bits_G: stored bits of
    every group of a ragged weight, in the order of the columns.

    16-bit floats are held as int16 bit patterns, so that no cast of the model to another float type touches them.
    """

    shape: tuple[int, int]
    bits: int
    group_size: int
    zero: float | None
    gain: float
    ratios: Mapping[int, tuple[float, float, bool]] = field(default_factory=dict)
    column_scale: bool = False
    bits_G: tuple[int, ...] | None = None

    @classmethod
    def of(cls, planes: Planes) -> Fields:
        """The numbers of `planes`."""
        zero = None if isinstance(planes.zero, Tensor) else float(planes.zero)
        ratios = {width: (t.low, t.high, t.index is not None) for width, t in planes.ratios.items()}
        shape = (int(planes.shape[0]), int(planes.shape[1]))
        scaled = planes.column_scale is not None
        return cls(shape, planes.bits, planes.group_size, zero, planes.gain, ratios, scaled, planes.bits_G)

    @property
    def columns(self) -> int:
        """Number of inputs."""
        return self.shape[1]

    @property
    def groups(self) -> int:
        """Groups per row."""
        return -(-self.shape[1] // self.group_size) if self.group_size else 1

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of every tensor that must be there, and no other."""
        rows, columns = self.shape
        row_blocks, column_blocks = -(-rows // ROWS), -(-columns // COLUMNS)
        codes: tuple[int, ...] = (self.bits, row_blocks, column_blocks, ROWS * COLUMNS // 8)
        if self.bits_G is not None:
            codes = (ragged_bytes(self.bits_G, self.shape, self.group_size),)
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "qplanes": (codes, torch.uint8),
            "scale": ((row_blocks, self.groups, ROWS), torch.int16),
        }
        if self.zero is None:
            found["zero"] = ((row_blocks, self.groups, ROWS), torch.uint8)
        for width in sorted(b for b, (_, _, grouped) in self.ratios.items() if grouped):
            found[f"ratio_{width}"] = ((row_blocks, self.groups, ROWS // 2), torch.uint8)
        if self.column_scale:
            found["column_scale"] = ((columns,), torch.int16)
        return found

    def planes(self, tensors: Mapping[str, Tensor]) -> Planes:
        """Planes over the given tensors; nothing is copied."""
        ratios = {
            width: RatioTable(low, high, tensors[f"ratio_{width}"] if grouped else None)
            for width, (low, high, grouped) in self.ratios.items()
        }
        return Planes(
            tensors["qplanes"],
            tensors["scale"].view(torch.float16),
            tensors["zero"] if self.zero is None else self.zero,
            self.gain,
            self.shape,
            self.group_size,
            ratios,
            tensors["column_scale"].view(torch.float16) if self.column_scale else None,
            self.bits_G,
        )

    def to_json(self) -> dict[str, Any]:
        """What config.json says about one weight."""
        ragged = {} if self.bits_G is None else {"group_bits": "".join(map(str, self.bits_G))}
        return {
            "shape": list(self.shape),
            "bits": self.bits,
            "group_size": self.group_size,
            "zero": "group" if self.zero is None else self.zero,
            "gain": self.gain,
            "ratios": {str(width): list(table) for width, table in sorted(self.ratios.items(), reverse=True)},
            "column_scale": self.column_scale,
            **ragged,
        }

    @classmethod
    def from_json(cls, name: str, value: Any) -> Fields:
        """The inverse of to_json; every key, type and range is checked and named in the refusal."""
        if not isinstance(value, Mapping):
            raise refusal(name, "entry", value, "an object")
        for key in sorted(KEYS ^ (set(value) - OPTIONAL)):
            raise refusal(name, key, "nothing" if key in KEYS else "an unknown key", f"exactly {sorted(KEYS)}")
        shape, bits, group_size = value["shape"], value["bits"], value["group_size"]
        if not (isinstance(shape, list) and len(shape) == 2 and all(is_integer(n, 1, LARGEST) for n in shape)):
            raise refusal(name, "shape", shape, "two integers from 1 to 2^31")
        if not is_integer(bits, 2, 8):
            raise refusal(name, "bits", bits, "an integer from 2 to 8")
        if not is_integer(group_size, 0, 256) or group_size not in GROUP_SIZES:
            raise refusal(name, "group_size", group_size, f"one of {GROUP_SIZES}")
        zero, gain = value["zero"], value["gain"]
        if zero != "group" and not (is_number(zero) and 0 <= zero < (1 << bits)):
            raise refusal(name, "zero", zero, f'"group" or a number from 0 to {(1 << bits) - 1}')
        if not (is_number(gain) and gain > 0 and frexp(gain)[0] == 0.5):
            raise refusal(name, "gain", gain, "a positive power of two")
        if not isinstance(value["column_scale"], bool):
            raise refusal(name, "column_scale", value["column_scale"], "true or false")
        ratios = read_ratios(name, value["ratios"], bits)
        size = (int(shape[0]), int(shape[1]))
        fixed = None if zero == "group" else float(zero)
        bits_G = read_group_bits(name, value, size[1], group_size) if "group_bits" in value else None
        return cls(size, bits, group_size, fixed, float(gain), ratios, value["column_scale"], bits_G)


def tensors_of(planes: Planes) -> dict[str, Tensor]:
    """Every tensor of `planes` by its stored name, 16-bit floats as int16 bit patterns; nothing is copied."""
    found = {"qplanes": planes.planes, "scale": planes.scale.view(torch.int16)}
    if isinstance(planes.zero, Tensor):
        found["zero"] = planes.zero
    found |= {f"ratio_{width}": table.index for width, table in planes.ratios.items() if table.index is not None}
    if planes.column_scale is not None:
        found["column_scale"] = planes.column_scale.view(torch.int16)
    return found


def check_columns(plan: Plan, layers: Mapping[str, Grouped]) -> None:
    """Refuse column offsets of a plan that do not fit the layers they are meant for."""
    for name in plan.columns:
        if name not in layers:
            raise PolybitError(
                f"the plan gives column widths to {name!r:.120}, which is no quantized layer: remove them"
            )
        plan.group_widths(name, layers[name].columns, layers[name].group_size)


def read_ratios(name: str, value: Any, bits: int) -> dict[int, tuple[float, float, bool]]:
    """Ratios from JSON, checked."""
    if not isinstance(value, Mapping):
        raise refusal(name, "ratios", value, "an object of widths")
    found = {}
    for width, table in value.items():
        if not (width.isdigit() and 1 <= int(width) <= bits):
            raise refusal(name, "a width of ratios", width, f"1 to {bits}")
        whole = isinstance(table, list) and len(table) == 3 and all(map(is_number, table[:2]))
        if not whole or not isinstance(table[2], bool) or table[0] > table[1]:
            raise refusal(name, f"ratio {width}", table, "[low, high, true or false] with low <= high")
        found[int(width)] = (float(table[0]), float(table[1]), table[2])
    return found


def read_group_bits(name: str, value: Mapping[str, Any], columns: int, group_size: int) -> tuple[int, ...]:
    """Bits of every group of a ragged weight from a string of digits, checked."""
    text = value["group_bits"]
    if group_size < COLUMNS:
        raise refusal(name, "group_bits", text, f"none for groups of {group_size}: only groups of 32 to 256")
    groups = -(-columns // group_size)
    if not isinstance(text, str) or len(text) != groups or set(text) - set("12345678"):
        raise refusal(name, "group_bits", text, f"a string of {groups} digits from 1 to 8")
    bits_G = tuple(int(digit) for digit in text)
    if max(bits_G) != value["bits"] or min(bits_G) == value["bits"]:
        raise refusal(name, "group_bits", text, f"widths of which the largest, and not all, are {value['bits']}")
    return bits_G


def is_integer(value: Any, low: int, high: int) -> bool:
    """True for a plain int (never a bool) inside [low, high]."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: Any) -> bool:
    """True for a finite int or float (never a bool)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def refusal(name: str, key: str, got: Any, allowed: str) -> PolybitError:
    """The sentence for a number that cannot be."""
    return PolybitError(
        f"the config says {key!s:.80} {got!r:.60} for layer {name!r:.120}, but {allowed} is needed: "
        "the checkpoint is damaged or was edited, make it again"
    )
