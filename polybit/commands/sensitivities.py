"""Sensitivities for `polybit allocate`: measured once, kept on disk, resumable by block, shared between workers."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from polybit.core.affine import Grid, QWeight, ZeroKind
from polybit.core.records import LayerStats
from polybit.core.runtime import PolybitError, atomic_path, track
from polybit.hub.models import resolve
from polybit.measure.probe import Probe
from polybit.measure.sensitivity import BlockReading, measure_layers
from polybit.measure.signals import Signal, gather
from polybit.measure.taylor import estimate_layers
from polybit.nn.convert import Target
from polybit.quant.table import QUANTIZERS

How = Literal["exact", "gradient"]
DATA_FREE = ("rtn", "hqq")


@dataclass(frozen=True, slots=True)
class Quantizing:
    """How a layer is harmed while its sensitivity is read: the quantizer, its widths and its grid."""

    widths: tuple[int, ...]
    method: str = "gptq"
    group_size: int = 64
    zero: ZeroKind = "centre"
    knobs: Mapping[str, Any] = field(default_factory=dict)

    def grid(self, width: int) -> Grid:
        """The grid of one width."""
        return Grid(width, self.group_size, self.zero)

    def codes(self, weight_OI: Tensor, stats: LayerStats | None) -> dict[int, QWeight]:
        """The layer's codes at every width."""
        quantize = QUANTIZERS[self.method]
        return {width: quantize(weight_OI, stats, self.grid(width), **self.knobs) for width in self.widths}


@dataclass(frozen=True, slots=True)
class Task:
    """All a process needs to measure some blocks."""

    model: str
    trust_remote_code: bool
    targets: tuple[Target, ...]
    probes: tuple[Probe, ...]
    calibration: tuple[Tensor, ...]
    quantizing: Quantizing
    how: How
    seed: int = 0

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
            "seed": self.seed if self.how == "gradient" else None,
        }


@dataclass(frozen=True, slots=True)
class Measured:
    """Signals by probe, the codes that were measured (layer -> width), and what it took."""

    signals: dict[str, Signal]
    bank: dict[str, dict[int, QWeight]]
    cost: dict[str, Any]


def default_cache() -> Path:
    """Where measurements are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polybit" / "sensitivity"


def measured(model, task: Task, digest: str, cache: Path, *, workers: int = 1, restart: bool = False) -> Measured:
    """The task's sensitivities: read from the cache, or measured block by block into it.

    cache: directory of all measurements; one directory in it belongs to one fingerprint. Memory beyond the model: one
    block's candidates; with workers, as many models as workers.
    """
    from polybit.hub.workspace import Workspace

    fingerprint = task.fingerprint(digest)
    name = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:20]
    store = Workspace(cache / name, fingerprint, restart=restart)
    try:
        from polybit.compress.blocks import find_blocks

        _, modules = find_blocks(model, task.targets)
        files = [store.path / f"block-{index:05d}.npz" for index in range(len(modules))]
        missing = [index for index, file in enumerate(files) if not file.is_file()]
        if missing and task.how == "gradient":
            missing = list(range(len(modules)))  # gradients come from behind: it is all or nothing
        done = len(modules) - len(missing)
        for index, content in track(measure(model, task, missing, workers), "sensitivities", len(modules), done=done):
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
    return Measured(gather(readings, {t.name: t.size for t in task.targets}), bank, cost)


def measure(model, task: Task, blocks: Sequence[int], workers: int) -> Iterator[tuple[int, bytes]]:
    """(block, its file) of every block asked for, in this process or in several."""
    if not blocks:
        return
    if task.how == "gradient" or workers <= 1:
        yield from run(model, task, blocks)
        return
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(min(workers, len(blocks)), get_context("spawn"), begin, (torch.get_num_threads(), task))
    with pool:
        jobs = [pool.submit(one_block, index) for index in blocks]
        try:
            for job in as_completed(jobs):
                yield job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


WORKER: dict[str, Any] = {}  # the model and the task of a worker process


def begin(threads: int, task: Task) -> None:
    """Start of a worker process: load the model once."""
    from polybit.hub.load import load_float

    torch.set_num_threads(threads)
    model, _ = load_float(resolve(task.model), trust_remote_code=task.trust_remote_code)
    WORKER.update(model=model.requires_grad_(False), task=task)


def one_block(index: int) -> tuple[int, bytes]:
    """Measure one block in a worker process."""
    return next(run(WORKER["model"], WORKER["task"], [index]))


def run(model, task: Task, blocks: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """(block, its file) of the blocks, measured here."""
    codes: dict[str, dict[int, QWeight]] = {}

    def candidates(target: Target, weight_OI: Tensor, stats: LayerStats | None) -> dict[int, Tensor]:
        codes[target.name] = task.quantizing.codes(weight_OI, stats)
        return {width: q.dequantize() for width, q in codes[target.name].items()}

    calibration = () if task.quantizing.method in DATA_FREE else task.calibration
    began = time.process_time()
    if task.how == "gradient":
        found = estimate_layers(model, task.probes, task.targets, candidates, calibration=calibration, seed=task.seed)
        readings: Iterator[BlockReading] = iter(found)
    else:
        readings = measure_layers(
            model, task.probes, task.targets, candidates, calibration=calibration, only=set(blocks)
        )
    left = len(blocks)
    for reading in readings:
        names = next(iter(reading.kl.values()))
        seconds, began = time.process_time() - began, time.process_time()
        yield reading.block, packed(reading, {name: codes.pop(name) for name in names}, seconds)
        left -= 1
        if not left:
            return  # what lies behind the last block asked for need not be walked through


def packed(reading: BlockReading, codes: Mapping[str, Mapping[int, QWeight]], seconds: float) -> bytes:
    """A block's numbers and codes as one .npz file, without pickle."""
    widths = {name: sorted(row) for name, row in codes.items()}
    meta: dict[str, Any] = {
        "block": reading.block,
        "probes": list(reading.kl),
        "widths": widths,
        "work": reading.work,
        "naive": reading.naive,
        "seconds": seconds,
        "codes": {},
    }
    arrays: dict[str, Any] = {}
    for at, probe in enumerate(reading.kl):
        arrays[f"tokens.{at}"] = reading.tokens[probe]
        if probe in reading.float_nll:
            arrays[f"float.{at}"] = reading.float_nll[probe]
        for kind, table in (("kl", reading.kl), ("nll", reading.nll)):
            for name, row in table[probe].items():
                arrays[f"{kind}.{at}.{name}"] = np.stack([row[w] for w in widths[name]])
    for name, by_width in codes.items():
        for width, q in by_width.items():
            key = f"{name}@{width}"
            meta["codes"][key] = {"bits": q.bits, "group_size": q.group_size}
            arrays |= {f"u.{key}": q.codes_OI.numpy(), f"s.{key}": q.scale_OG.numpy(), f"z.{key}": q.zero.numpy()}
            if q.column_scale_I is not None:
                arrays[f"c.{key}"] = q.column_scale_I.numpy()
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    buffer = BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def unpacked(path: Path) -> tuple[BlockReading, dict[str, dict[int, QWeight]], float]:
    """The inverse of `packed`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(bytes(file["meta"]))
            reading = BlockReading(meta["block"], work=meta["work"], naive=meta["naive"])
            for at, probe in enumerate(meta["probes"]):
                reading.tokens[probe] = file[f"tokens.{at}"]
                if f"float.{at}" in file:
                    reading.float_nll[probe] = file[f"float.{at}"]
                for kind, table in (("kl", reading.kl), ("nll", reading.nll)):
                    table[probe] = {
                        name: dict(zip(widths, file[f"{kind}.{at}.{name}"], strict=True))
                        for name, widths in meta["widths"].items()
                    }
            codes: dict[str, dict[int, QWeight]] = {}
            for key, fields in meta["codes"].items():
                name, _, width = key.rpartition("@")
                part = {leaf: torch.from_numpy(file[f"{leaf}.{key}"]) for leaf in "uszc" if f"{leaf}.{key}" in file}
                codes.setdefault(name, {})[int(width)] = QWeight(
                    part["u"], part["s"], part["z"], fields["bits"], fields["group_size"], {}, part.get("c")
                )
            return reading, codes, float(meta["seconds"])
    except (OSError, ValueError, KeyError) as error:
        raise PolybitError(
            f"{path} of an earlier run cannot be read ({error!s:.100}): measure again with --restart"
        ) from (error)
