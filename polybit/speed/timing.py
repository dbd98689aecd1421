"""Time pieces of work against each other on a machine whose speed drifts: interleaved rounds, bracketed by probes.

The memory bandwidth of a shared machine changes within seconds, so jobs take turns in every round, every timing stands
between two probes that read memory as fast as the machine can, and ratios are formed within a round before their median
is taken. Matrices are rotated so that none is in the cache when its turn comes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from polybit.core.memory import collapse
from polybit.core.runtime import PolybitError, track
from polybit.kernels import cpu

BEYOND_CACHE = 80 << 20  # bytes read between two visits of the same matrix
PROBE_BYTES = 128 << 20
BITE = 32 << 20  # of the probe's buffer read each time, a part of it nobody touched lately


@dataclass(frozen=True, slots=True)
class Job:
    """A piece of work that is timed: `call(i)` works on the i-th of `copies` weights.

    size: bytes one call must read · operations: multiply-adds of one call, counted as two · bits: effective bits per
    weight · engine: whose code it is · unit: how many of what one call makes (1 call, 16 tokens).
    """

    name: str
    engine: str
    call: Callable[[int], Any]
    copies: int = 1
    size: int = 0
    operations: int = 0
    bits: float = 0.0
    unit: float = 1.0


@dataclass(slots=True)
class Timed:
    """Seconds per call of one job and its share of the probes around it, round by round."""

    seconds: list[float] = field(default_factory=list)
    share: list[float] = field(default_factory=list)


class MemoryProbe:
    """Reads main memory as fast as all of torch's threads can; bytes per second."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.buffer = torch.zeros(PROBE_BYTES, dtype=torch.uint8).random_()
        collapse(self.buffer)
        self.place = 0
        self.library = cpu.library()

    def __call__(self) -> float:
        self.place = (self.place + BITE) % PROBE_BYTES
        if self.library is None:
            part = self.buffer[self.place : self.place + BITE].view(torch.int64)
            begin = self.clock()
            part.sum()
        else:
            begin = self.clock()
            self.library.read(0, self.buffer.data_ptr() + self.place, BITE)
        return BITE / (self.clock() - begin)


def clock_for(threads: int) -> Callable[[], float]:
    """With one thread the thread's own clock, which leaves out the time other work held the core."""
    return time.thread_time if threads == 1 else time.perf_counter


def time_rounds(
    jobs: Sequence[Job], rounds: int, probe: Callable[[], float], clock: Callable[[], float], label: str = "bench"
) -> dict[str, Timed]:
    """Every job in every round, after each was run once unseen; name -> its timings."""
    if rounds < 1:
        raise PolybitError(f"--rounds {rounds} is not possible: give 1 or more, 30 for a number to rely on")
    found = {job.name: Timed() for job in jobs}
    for job in jobs:
        for i in range(job.copies):
            job.call(i)
    for _ in track(range(rounds), label):
        before = probe()
        for job in jobs:
            begin = clock()
            for i in range(job.copies):
                job.call(i)
            seconds = (clock() - begin) / job.copies
            after = probe()
            found[job.name].seconds.append(seconds)
            found[job.name].share.append(job.size / seconds / ((before + after) / 2))
            before = after
    return found


def summarize(jobs: Sequence[Job], found: Mapping[str, Timed], peak: float = 0.0) -> list[dict[str, Any]]:
    """One row per job: seconds (median, 20th and 80th percentile), GB/s, share of probe and of the int8 peak."""
    rows = []
    for job in jobs:
        timed = found[job.name]
        middle = statistics.median(timed.seconds)
        rows.append(
            {
                "name": job.name,
                "engine": job.engine,
                "bits": round(job.bits, 3),
                "bytes": job.size,
                "seconds": middle,
                "p20": percentile(timed.seconds, 0.2),
                "p80": percentile(timed.seconds, 0.8),
                "per_second": job.unit / middle,
                "gigabytes_per_second": job.size / middle / 1e9,
                "paired_share": statistics.median(timed.share) if job.size else None,
                "of_int8_peak": job.operations / middle / peak if peak and job.operations else None,
            }
        )
    return rows


def paired_ratio(found: Mapping[str, Timed], job: str, other: str) -> dict[str, float]:
    """How many times faster `job` is than `other`: median, 20th and 80th percentile of the ratios within rounds."""
    ratios = [b / a for a, b in zip(found[job].seconds, found[other].seconds, strict=True)]
    return {"median": statistics.median(ratios), "p20": percentile(ratios, 0.2), "p80": percentile(ratios, 0.8)}


def against_peers(table: list[dict[str, Any]], found: Mapping[str, Timed]) -> list[dict[str, Any]]:
    """Each of our rows with its paired speed against the fastest peer that reads at least as many bits."""
    for row in table:
        kind = row["engine"].removeprefix("polybit")
        if row["engine"] == "polybit" + kind:
            others = [r for r in table if r["engine"] in ("torch" + kind, "llama.cpp" + kind)]
            equal = [r for r in others if r["bits"] >= row["bits"] - 0.3] or others
            if equal:
                best = max(equal, key=lambda r: r["per_second"])
                row["ratio"] = {"of": best["name"], **paired_ratio(found, row["name"], best["name"])}
    return table


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, an actual one of them."""
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def int8_peak(clock: Callable[[], float]) -> float:
    """8-bit multiply-adds per second of the registers alone, counted as two operations; 0 without compiled kernels."""
    library = cpu.library()
    best = 0.0
    for _ in range(5 if library else 0):
        assert library is not None
        begin = clock()
        done = library.multiply(0, 3_000_000)
        best = max(best, done / (clock() - begin))
    return best
