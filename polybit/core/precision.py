"""Precision: how many bits each operand of a layer has, written `w4a8k8v4`."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from polybit.core.runtime import PolybitError

FLOAT = 16  # the width that means "left alone"
ALLOWED = {
    "w": (2, 3, 4, 5, 6, 7, 8, FLOAT),
    "a": (4, 5, 6, 7, 8, FLOAT),
    "q": (4, 5, 6, 7, 8, FLOAT),
    "k": (2, 3, 4, 5, 6, 7, 8, FLOAT),
    "v": (2, 3, 4, 5, 6, 7, 8, FLOAT),
}


@dataclass(frozen=True, slots=True)
class Precision:
    """Bits of weights (w), activations (a) and the attention operands (q, k, v) of one layer; 16 = left in float."""

    w: int = FLOAT
    a: int = FLOAT
    q: int = FLOAT
    k: int = FLOAT
    v: int = FLOAT

    def __post_init__(self) -> None:
        for field in fields(self):
            check_width(field.name, getattr(self, field.name))

    @classmethod
    def parse(cls, text: str | int | Precision) -> Precision:
        """Read `w4a8k8v4`, `w4`, `float`, or a bare number, which means weights: `4` = `w4`."""
        if isinstance(text, Precision):
            return text
        spelled = str(text).strip().lower()
        if spelled in ("float", "fp", "none"):
            return cls()
        if re.fullmatch("[0-9]{1,6}", spelled):
            return cls(w=int(spelled))
        parts = re.findall("([a-z])([0-9]{1,6})", spelled)
        letters = [letter for letter, _ in parts]
        readable = "".join(f"{letter}{bits}" for letter, bits in parts) == spelled
        if not parts or not readable or len(set(letters)) != len(letters) or set(letters) - set(ALLOWED):
            raise PolybitError(
                f"precision {text!r:.120} cannot be read: write letters w, a, q, k, v each at most once with their "
                "bits, as in 'w4', 'w4a8' or 'w4a8k8v4', or 'float'"
            )
        return cls(**{letter: int(bits) for letter, bits in parts})

    def __str__(self) -> str:
        spelled = "".join(f"{f.name}{getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != FLOAT)
        return spelled or "float"


def check_width(operand: str, bits: int) -> int:
    """Refuse a width the operand cannot have."""
    if not isinstance(bits, int) or isinstance(bits, bool) or bits not in ALLOWED[operand]:
        allowed = ", ".join(map(str, ALLOWED[operand]))
        raise PolybitError(f"{bits!r} bits for operand '{operand}' are not possible: choose one of {allowed}")
    return bits


def parse_widths(text: str) -> tuple[int, ...]:
    """Read `8,6,4,3,2` into distinct weight widths, widest first."""
    try:
        widths = [int(part) for part in text.replace(" ", "").split(",") if part]
    except ValueError:
        widths = []
    if not widths or FLOAT in widths:
        raise PolybitError(f"widths {text!r} cannot be read: give numbers from 2 to 8 with commas, as in '8,6,4,3,2'")
    for bits in widths:
        check_width("w", bits)
    return tuple(sorted(set(widths), reverse=True))
