"""What this machine can do, measured by `polybit bench` and kept, so that `polybit plan` can predict speed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

from polybit.core.records import processor_name
from polybit.core.runtime import write_json

FILE = "machine.json"
BLOCK_SECONDS = 90e-6  # of a block on the fast path (hub/decode.py) beside its products, and what small ones lose
PLAIN_BLOCK_SECONDS = 400e-6  # the same through transformers' generate


@dataclass(frozen=True, slots=True)
class Constants:
    """Speed of one machine with a number of threads.

    bandwidth: bytes per second of the read probe · efficiency: width -> share of it the products of one token reach ·
    call_seconds: one product beside reading its weight · block_seconds: one decoder block beside its products ·
    int8_peak: operations per second · model_factor: seconds of a measured model over the prediction, 1 before there is
    one.
    """

    processor: str
    threads: int
    measured: str
    bandwidth: float
    efficiency: Mapping[int, float]
    call_seconds: float
    int8_peak: float = 0.0
    notes: Mapping[str, str] = field(default_factory=dict)

    def seconds_per_token(
        self,
        width: int,
        *,
        quantized: float,
        floats: float,
        calls: int,
        blocks: int,
        block_seconds: float | None = None,
    ) -> float:
        """Predicted seconds of one decoding step: bytes at the speed this width reaches, calls, blocks."""
        known = sorted(self.efficiency)
        nearest = min(known, key=lambda b: abs(b - width))
        read = quantized / (self.bandwidth * self.efficiency[nearest]) + floats / self.bandwidth
        return read + calls * self.call_seconds + blocks * (BLOCK_SECONDS if block_seconds is None else block_seconds)


def cache_directory() -> Path:
    """Where polybit keeps what it may recompute: POLYBIT_CACHE, else ~/.cache/polybit."""
    given = os.environ.get("POLYBIT_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "polybit"


def keep(constants: Constants) -> Path:
    """Write the constants beside those for other numbers of threads; the file they are in."""
    path = cache_directory() / FILE
    found = read_all(path)
    found[str(constants.threads)] = asdict(constants)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    return path


def recall(threads: int) -> Constants | None:
    """The constants measured on this very processor: with that many threads, or None."""
    value = read_all(cache_directory() / FILE).get(str(threads))
    try:
        efficiency = {int(width): float(share) for width, share in value["efficiency"].items()}  # type: ignore[index]
        constants = Constants(**{**value, "efficiency": efficiency})  # type: ignore[dict-item]
    except (TypeError, KeyError, ValueError, AttributeError):
        return None  # absent, or written by another version
    usable = constants.efficiency and constants.bandwidth > 0 and min(constants.efficiency.values()) > 0
    return constants if usable and constants.processor == processor_name() else None


def read_all(path: Path) -> dict[str, dict]:
    """Everything kept, by number of threads; empty when the file is not there or not readable."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def today() -> str:
    """The date as it is kept."""
    return date.today().isoformat()
