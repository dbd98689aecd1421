"""Sensitivities measured once: kept on disk, resumable by block, shared between workers."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from polybit.compress.blocks import find_blocks
from polybit.core.affine import QWeight
from polybit.core.parts import pick
from polybit.core.records import LayerStats
from polybit.core.runtime import atomic_path, track, warn
from polybit.hub.load import load_float
from polybit.hub.models import resolve
from polybit.hub.workers import ALONE, Where, spread
from polybit.hub.workspace import Workspace
from polybit.measure.block_files import packed, unpacked
from polybit.measure.probe import ProbeText
from polybit.measure.quantizing import Quantizing
from polybit.measure.signals import Signal, gather
from polybit.measure.table import SIGNALS, HarmSignal
from polybit.nn.convert import Target


@dataclass(frozen=True, slots=True)
class SensitivityTask:
    """All a process needs to measure some blocks."""

    model: str
    trust_remote_code: bool
    targets: tuple[Target, ...]
    probes: tuple[ProbeText, ...]
    calibration: tuple[Tensor, ...]
    quantizing: Quantizing
    how: str = "exact"
    seed: int = 0

    @property
    def signal(self) -> HarmSignal:
        """The part of SIGNALS that reads them."""
        return pick(SIGNALS, self.how, "sensitivity")

    def fingerprint(self, weights_digest: str) -> dict[str, Any]:
        """Everything the numbers depend on."""
        text = hashlib.sha256(b"".join(ids.numpy().tobytes() for ids in self.calibration)).hexdigest()
        return {
            "model": weights_digest,
            "layers": hashlib.sha256(repr(self.targets).encode()).hexdigest(),
            "probes": {probe.name: probe.digest() for probe in self.probes},
            "calibration": text,
            "quantizing": {**asdict(self.quantizing), "widths": list(self.quantizing.widths)},
            "how": self.how,
            "seed": self.seed if self.signal.drawn else None,
        }


@dataclass(frozen=True, slots=True)
class MeasuredSignals:
    """Signals by probe, the codes that were measured (layer -> width), and what it took."""

    signals: dict[str, Signal]
    bank: dict[str, dict[int, QWeight]]
    cost: dict[str, Any]


def default_cache() -> Path:
    """Where measurements are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polybit" / "sensitivity"


def measured(
    model, task: SensitivityTask, digest: str, cache: Path, *, where: Where = ALONE, restart: bool = False
) -> MeasuredSignals:
    """The task's sensitivities: read from the cache, or measured block by block into it.

    cache: directory of all measurements; one directory in it belongs to one fingerprint. Memory beyond the model: one
    block's candidates; with workers, as many models as workers, who walk through all blocks and measure some.
    """
    fingerprint = task.fingerprint(digest)
    name = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:20]
    store = Workspace(cache / name, fingerprint, restart=restart)
    try:
        _, modules = find_blocks(model, task.targets)
        files = [store.path / f"block-{index:05d}.npz" for index in range(len(modules))]
        missing = [index for index, file in enumerate(files) if not file.is_file()]
        if missing and not task.signal.by_block:
            missing = list(range(len(modules)))
        done = len(modules) - len(missing)
        for index, content in track(measure(model, task, missing, where), "sensitivities", len(modules), done=done):
            with atomic_path(files[index]) as staged:
                staged.write_bytes(content)
        blocks = [unpacked(file) for file in files]
    finally:
        store.close()
    readings = [reading for reading, _, _ in blocks]
    bank = {name: row for _, codes, _ in blocks for name, row in codes.items()}
    work, naive = sum(r.work for r in readings), sum(r.naive for r in readings)
    cost = {
        "how": task.how,
        "cpu_seconds": sum(seconds for _, _, seconds in blocks),
        "block_forwards": work,
        "naive_block_forwards": naive,
        "share_of_naive": work / naive if naive else None,
        "kept_at": str(store.path),
        "measured_now": len(missing),
    }
    return MeasuredSignals(gather(readings, {t.name: t.size for t in task.targets}), bank, cost)


def measure(model, task: SensitivityTask, blocks: Sequence[int], where: Where) -> Iterator[tuple[int, bytes]]:
    """(block, its file) of every block asked for, in this process or by workers."""
    if where.alone or not task.signal.by_block:
        if not where.alone and blocks:
            warn(f"{task.how} sensitivities are read in one process: every block needs what lies behind it")
        yield from islice(run(model, task, set(blocks)), len(blocks))  # what lies behind the last is not walked through
        return
    for _, content in spread(BlockMeasurer, (task,), blocks, where=where, models=[task.model]):
        yield content


class BlockMeasurer:
    """Measures blocks in a worker. Asked in ascending order it walks through the model once."""

    def __init__(self, task: SensitivityTask) -> None:
        model, _ = load_float(resolve(task.model), trust_remote_code=task.trust_remote_code)
        self.model, self.task = model.requires_grad_(False), task
        self.asked: set[int] = set()
        self.walk: Iterator[tuple[int, bytes]] = iter(())
        self.last: int | None = None

    def __call__(self, index: int) -> tuple[int, bytes]:
        """(block, its file)."""
        if self.last is None or index <= self.last:
            self.walk = run(self.model, self.task, self.asked)
        self.asked.clear()
        self.asked.add(index)
        self.last = index
        return next(self.walk)


def run(model, task: SensitivityTask, blocks: Collection[int]) -> Iterator[tuple[int, bytes]]:
    """(block, its file) of the blocks, measured here; `blocks` is asked when the walk comes to one."""
    codes: dict[str, dict[int, QWeight]] = {}

    def candidates(target: Target, weight_OI: Tensor, stats: LayerStats | None) -> dict[int, Tensor]:
        codes[target.name] = task.quantizing.codes(weight_OI, stats)
        return {width: q.dequantize() for width, q in codes[target.name].items()}

    began = time.process_time()
    readings = task.signal(
        model,
        task.probes,
        task.targets,
        candidates,
        calibration=task.calibration if task.quantizing.needs_stats else (),
        only=blocks,
        seed=task.seed,
    )
    for reading in readings:
        names = next(iter(reading.kl.values()))
        seconds, began = time.process_time() - began, time.process_time()
        yield reading.block, packed(reading, {name: codes.pop(name) for name in names}, seconds)
