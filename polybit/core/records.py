"""Records that pass between rooms: what calibration saw, what harm costs, what a run was, how a model was turned."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from polybit.core.runtime import PolybitError, write_json

RUN_FILE = "run.json"  # the record of a run, beside what it made


ROTATION = "hadamard"  # the one kind of rotation there is


@dataclass(frozen=True, slots=True)
class LayerStats:
    """What calibration saw at a layer's input.

    hessian_II: mean over tokens of x xT, float32 [I, I] · absmean_I: mean |x| per input column · tokens: how many.
    """

    hessian_II: Tensor
    absmean_I: Tensor
    tokens: int


@dataclass(frozen=True, slots=True)
class CostTable:
    """layer -> bits -> harm in nats per token; tables in the same unit add up."""

    nats: dict[str, dict[int, float]]
    sizes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured mean with its 95 % bootstrap interval over `n` items."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int]:
        """Plain numbers."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


@dataclass(slots=True)
class Run:
    """One execution of one verb: its whole configuration, where it ran, how long it took, what it measured."""

    verb: str
    config: dict[str, Any]
    numbers: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    begun: tuple[float, float] | None = None  # the clocks when what is being timed began

    def to_json(self) -> dict[str, Any]:
        """The content of run.json and of --json FILE; amid what is timed, with the seconds so far."""
        wall, cpu = self.clocks()
        return {
            "verb": self.verb,
            "config": self.config,
            "numbers": self.numbers,
            "seconds": round(self.seconds + wall, 3),
            "cpu_seconds": round(self.cpu_seconds + cpu, 3),
            "machine": machine(),
        }

    def write(self, path: Path) -> None:
        """Write atomically."""
        write_json(path, self.to_json())

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the wall and CPU seconds of the body."""
        self.begun = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            wall, cpu = self.clocks()
            self.seconds, self.cpu_seconds, self.begun = self.seconds + wall, self.cpu_seconds + cpu, None

    def clocks(self) -> tuple[float, float]:
        """Wall and CPU seconds since what is being timed began; 0 where nothing is."""
        if self.begun is None:
            return 0.0, 0.0
        return time.perf_counter() - self.begun[0], time.process_time() - self.begun[1]


def read_run(path: Path, verb: str) -> Mapping[str, Any]:
    """The JSON of an earlier run, refused when it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PolybitError(f"{path} does not exist: write it with `polybit {verb} ... --json {path}`") from None
    except (OSError, ValueError, RecursionError) as error:
        raise PolybitError(
            f"{path} cannot be read as JSON ({error!s:.120}): write it with `polybit {verb} --json`"
        ) from None
    parts = ("numbers", "config", "machine")
    if (
        not isinstance(value, dict)
        or value.get("verb") != verb
        or not all(isinstance(value.get(p), dict) for p in parts)
    ):
        raise PolybitError(f"{path} is not what `polybit {verb} --json` writes: give that file")
    return value


@dataclass(frozen=True, slots=True)
class Rotation:
    """All that decides a rotation; a checkpoint keeps it in its notes, so that its float model can be turned alike.

    The signs come from Python's own generator, whose numbers are the same on every machine and version.
    """

    seed: int = 0
    kind: str = ROTATION

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint's notes."""
        return {"kind": self.kind, "seed": self.seed}

    @classmethod
    def from_json(cls, value: Any) -> Rotation:
        """The inverse of to_json, checked."""
        if not isinstance(value, Mapping) or set(value) != {"kind", "seed"}:
            raise PolybitError(f"the checkpoint's rotation is {value!r:.80}: it must give a kind and a seed")
        if value["kind"] != ROTATION:
            raise PolybitError(
                f"the checkpoint's rotation is of kind {value['kind']!r:.40}, not {ROTATION!r}: upgrade polybit"
            )
        if not isinstance(value["seed"], int) or isinstance(value["seed"], bool):
            raise PolybitError(
                f"the seed of the checkpoint's rotation is {value['seed']!r:.40}: it must be a whole number"
            )
        return cls(value["seed"])

    def signs(self, place: str, size: int) -> Tensor:
        """[size] of -1 and 1, float64, other ones at every place of the model."""
        draw = Random(f"{self.seed} {place}")
        return torch.tensor([-1.0 if draw.random() < 0.5 else 1.0 for _ in range(size)], dtype=torch.float64)


def machine() -> dict[str, Any]:
    """Versions and hardware a number depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def processor_name() -> str:
    """The processor's own name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
