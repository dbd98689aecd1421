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
from polybit.compress.source import IN_MEMORY, SourceName, WeightSource
from polybit.compress.states import Room
from polybit.core.affine import QWeight
from polybit.core.parts import pick
from polybit.core.records import LayerStats
from polybit.core.runtime import atomic_path, track
from polybit.hub.workers import ALONE, Where, spread
from polybit.hub.workspace import Workspace
from polybit.measure.block_files import CODES_BYTES, KeptCodes, packed, unpacked
from polybit.measure.probe import ProbeText
from polybit.measure.quantizing import Decoded, Quantizing
from polybit.measure.signals import Signal, gather
from polybit.measure.table import SIGNALS, HarmSignal
from polybit.nn.convert import Target


@dataclass(frozen=True, slots=True)
class SensitivityTask:
    """All a process needs to measure some blocks."""

    model: SourceName
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
    bank: KeptCodes
    cost: dict[str, Any]


def default_cache() -> Path:
    """Where measurements are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polybit" / "sensitivity"


def measured(
    model,
    task: SensitivityTask,
    digest: str,
    cache: Path,
    *,
    where: Where = ALONE,
    restart: bool = False,
    source: WeightSource = IN_MEMORY,
    room: Room | None = None,
) -> MeasuredSignals:
    """The task's sensitivities: read from the cache, or measured block by block into it.

    cache: directory of all measurements; one directory in it belongs to one fingerprint · source, room: what lends the
    model's weights, and how much of the hidden states may be in memory. Memory beyond the model: one block's
    candidates; with workers, as many models as workers, who walk through all blocks and measure some.
    """
    fingerprint = task.fingerprint(digest)
    name = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:20]
    store = Workspace(cache / name, fingerprint, restart=restart)
    try:
        _, modules = find_blocks(model, task.targets)
        files = [store.path / f"block-{index:05d}.npz" for index in range(len(modules))]
        missing = [index for index, file in enumerate(files) if not file.is_file()]
        done = len(modules) - len(missing)
        found = measure(model, task, missing, where, source, room)
        for index, content in track(found, "sensitivities", len(modules), done=done):
            with atomic_path(files[index]) as staged:
                staged.write_bytes(content)
        blocks = [unpacked(file) for file in files]
    finally:
        store.close()
    readings = [reading for reading, _ in blocks]
    work, naive = sum(r.work for r in readings), sum(r.naive for r in readings)
    cost = {
        "how": task.how,
        "cpu_seconds": sum(seconds for _, seconds in blocks),
        "block_forwards": work,
        "naive_block_forwards": naive,
        "share_of_naive": work / naive if naive else None,
        "kept_at": str(store.path),
        "measured_now": len(missing),
    }
    most = None if room is None else room.limit
    bank = KeptCodes(files) if most is None else KeptCodes(files, min(most, CODES_BYTES))
    return MeasuredSignals(gather(readings, {t.name: t.size for t in task.targets}), bank, cost)


def measure(
    model, task: SensitivityTask, blocks: Sequence[int], where: Where, source: WeightSource, room: Room | None
) -> Iterator[tuple[int, bytes]]:
    """(block, its file) of every block asked for, in this process or by workers."""
    if where.alone:
        found = run(model, task, set(blocks), source, room)
        yield from islice(found, len(blocks))  # what lies behind the last is not walked through
        return
    walked = list(reversed(blocks)) if task.signal.backwards else blocks
    for _, content in spread(BlockMeasurer, (task,), walked, where=where, models=[task.model.name]):
        yield content


class BlockMeasurer:
    """Measures blocks in a worker. Asked in the order of the signal it walks through the model once."""

    def __init__(self, task: SensitivityTask) -> None:
        self.model, self.where = task.model.open()
        self.task = task
        self.asked: set[int] = set()
        self.walk: Iterator[tuple[int, bytes]] = iter(())
        self.last: int | None = None

    def __call__(self, index: int) -> tuple[int, bytes]:
        """(block, its file)."""
        if self.last is None or (index >= self.last if self.task.signal.backwards else index <= self.last):
            self.walk = run(self.model, self.task, self.asked, **self.where)
        self.asked.clear()
        self.asked.add(index)
        self.last = index
        return next(self.walk)


def run(
    model, task: SensitivityTask, blocks: Collection[int], source: WeightSource, room: Room | None
) -> Iterator[tuple[int, bytes]]:
    """(block, its file) of the blocks, measured here; `blocks` is asked when the walk comes to one."""
    codes: dict[str, dict[int, QWeight]] = {}

    def candidates(target: Target, weight_OI: Tensor, stats: LayerStats | None) -> Decoded:
        found = task.quantizing.codes(weight_OI, stats)
        codes[target.name] = {width: q.to("cpu") for width, q in found.items()}
        return Decoded(found)

    began = time.process_time()
    readings = task.signal(
        model,
        task.probes,
        task.targets,
        candidates,
        calibration=task.calibration if task.quantizing.needs_stats else (),
        only=blocks,
        seed=task.seed,
        source=source,
        room=room,
    )
    for reading in readings:
        names = next(iter(reading.kl.values()))
        seconds, began = time.process_time() - began, time.process_time()
        yield reading.block, packed(reading, {name: codes.pop(name) for name in names}, seconds)
