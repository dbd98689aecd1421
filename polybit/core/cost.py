"""What a precision costs, said three ways that are never confused: BitOPs, bytes read per token, measured time.

BitOPs count multiplications by the bits of both operands, MACs * b_w * b_a, with a float operand counted as 32 bits
(FP32 = 32 * 32). They say what a chip built for it could save; on a CPU or a GPU a token takes the time its bytes take
to be read, and only a measured time is a time (Double-Win Quant, ICML 2021, and CPT, ICLR 2021, report BitOPs).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from polybit.core.precision import FLOAT, Precision
from polybit.core.runtime import PolybitError

FLOAT_BITS = 32  # an operand left in float


@dataclass(frozen=True, slots=True)
class Work:
    """Multiply-adds of one kind in a forward pass of one token.

    operands: which two widths of a Precision meet, as in "wa" (a linear layer), "qk" (attention scores) or "pv" (values
    weighted by probabilities, which stay in float).
    """

    name: str
    macs: float
    operands: str = "wa"


def width_of(precision: Precision, operand: str) -> int:
    """Bits of an operand as BitOPs count them."""
    bits = FLOAT if operand == "p" else getattr(precision, operand)
    return FLOAT_BITS if bits == FLOAT else bits


def bitops(macs: float, weight_bits: float, activation_bits: float) -> float:
    """MACs * b_w * b_a."""
    return macs * weight_bits * activation_bits


def bitops_of(work: Iterable[tuple[Work, Precision]]) -> float:
    """BitOPs of a token: every piece of work at its precision."""
    return sum(bitops(w.macs, width_of(p, w.operands[0]), width_of(p, w.operands[1])) for w, p in work)


def relative_bitops(weight_bits: float, activation_bits: float, *, base: float = FLOAT_BITS) -> float:
    """BitOPs as a share of those at `base` bits for both operands."""
    return weight_bits * activation_bits / base**2


def drawn_bitops(macs: float, widths: Sequence[int]) -> float:
    """Mean BitOPs when both operands get one width drawn uniformly for each input (random precision)."""
    if not widths:
        raise PolybitError("random precision needs at least one width to draw from")
    return macs * sum(b * b for b in widths) / len(widths)


def training_bitops(forward_bits: Sequence[float], gradient_bits: float = FLOAT_BITS) -> float:
    """BitOPs of training as a share of FP32 training: mean over steps of the forward pass (b * b) and the two products
    of the backward pass (b * g each), over 32 * 32 (the cost model of CPT's code)."""
    if not forward_bits:
        raise PolybitError("training without a step has no cost")
    per_step = [(b * b + 2 * b * gradient_bits) / 3 for b in forward_bits]
    return sum(per_step) / len(per_step) / FLOAT_BITS**2


@dataclass(frozen=True, slots=True)
class Cost:
    """One precision, three costs per token, each under its own name; None where it was not measured.

    bitops: counted · weight_bytes and cache_bytes: read for a token at `context` tokens · ms: median of measured
    milliseconds per token on the machine at hand, with the 10th and 90th percentile.
    """

    name: str
    bitops: float
    weight_bytes: float
    cache_bytes: float
    context: int
    ms: tuple[float, float, float] | None = None

    @property
    def bytes(self) -> float:
        """Bytes read for a token."""
        return self.weight_bytes + self.cache_bytes

    def to_json(self) -> dict[str, object]:
        """Plain numbers."""
        return {
            "bitops_per_token": self.bitops,
            "bytes_per_token": {"weights": self.weight_bytes, "cache": self.cache_bytes, "context": self.context},
            "ms_per_token": None if self.ms is None else dict(zip(("median", "p10", "p90"), self.ms, strict=True)),
        }


def agreements(rows: Sequence[Cost]) -> dict[str, float]:
    """Spearman's rank correlation of each pair of costs over the precisions; empty for fewer than three."""
    columns = {"bitops": [row.bitops for row in rows], "bytes": [row.bytes for row in rows]}
    if all(row.ms is not None for row in rows):
        columns["ms"] = [row.ms[0] for row in rows if row.ms is not None]
    names = list(columns)
    if len(rows) < 3:
        return {}
    return {
        f"{one} and {other}": spearman(columns[one], columns[other])
        for n, one in enumerate(names)
        for other in names[n + 1 :]
    }


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Correlation of ranks, equal values sharing their mean rank; 0 where one side is constant."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2 for value in values]

    a, b = ranks(one), ranks(other)
    return statistics.correlation(a, b) if len(set(a)) > 1 and len(set(b)) > 1 else 0.0
