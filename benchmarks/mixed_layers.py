"""Time what a layer may be beside one width for all: widths per block of columns, weights in one call, an adapter.

Interleaved and paired with a read-bandwidth probe as `polybit bench linear` is. `bytes` is what the call reads, so that
a layer of 3.5 bits is held against the bytes of 3.5 bits.

    python benchmarks/mixed_layers.py --rounds 30 --threads 2
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from polybit.core.affine import QWeight, centre
from polybit.core.memory import collapse
from polybit.core.planes import Planes, pack, read_widths
from polybit.core.records import machine
from polybit.hub.random_model import random_planes
from polybit.kernels.adapter import Adapter
from polybit.kernels.prepared import Bundle, Prepared
from polybit.speed.timing import Job, MemoryProbe, clock_for, time_rounds

GROUP = 64
BLOCK = 128  # columns that share a width
Jobs = dict[str, tuple[Callable[[int], object], int, int]]


def mixed(columns: int, low: int, high: int, order: str) -> tuple[int, ...]:
    """Half of the blocks at each of two widths, in halves or scattered; a width per group."""
    blocks = columns // BLOCK
    draw = torch.Generator().manual_seed(1)
    chosen = torch.randperm(blocks, generator=draw) if order == "scattered" else torch.arange(blocks)
    wide = {int(b) for b in chosen[: blocks // 2]}
    return tuple(high if g * GROUP // BLOCK in wide else low for g in range(columns // GROUP))


def ragged(rows: int, columns: int, bits_G: tuple[int, ...], seed: int) -> Planes:
    """A weight that stores each group at its own width."""
    draw = torch.Generator().manual_seed(seed)
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    scale = torch.full((rows, columns // GROUP), 0.5)
    bits = max(bits_G)
    p = pack(QWeight(codes, scale, torch.tensor(centre(bits)), bits, GROUP, {}, None, torch.tensor(bits_G)))
    p.planes.random_(0, 256, generator=draw)
    collapse(p.planes)  # large pages, as the nested weights beside it
    return p


def column_jobs(rows: int, columns: int, copies: int, arithmetic: str) -> Jobs:
    """Uniform widths beside means of two, stored so (ragged) or read so from a nested weight (elastic)."""
    x, jobs = torch.randn(1, columns), {}
    nested = [Prepared(random_planes(rows, columns, i)) for i in range(copies)]
    for width in (2, 3, 4):
        jobs[f"{width} bits"] = (reader(nested, x, width, arithmetic), copies, nested[0].planes.nbytes(width))
    for low, high, order in ((3, 4, "halves"), (3, 4, "scattered"), (2, 4, "scattered"), (2, 3, "scattered")):
        bits_G = mixed(columns, low, high, order)
        size = nested[0].planes.nbytes(bits_G)
        name = f"{(low + high) / 2} bits ({low}, {high}), {order}"
        jobs[f"{name}, elastic"] = (reader(nested, x, bits_G, arithmetic), copies, size)
        stored = [Prepared(ragged(rows, columns, bits_G, i)) for i in range(copies)]
        assert stored[0].planes.nbytes() == size and read_widths(stored[0].planes, high) == bits_G
        jobs[f"{name}, ragged"] = (reader(stored, x, high, arithmetic), copies, size)
    return jobs


def reader(
    weights: list[Prepared], x: torch.Tensor, width: int | tuple[int, ...], arithmetic: str
) -> Callable[[int], object]:
    """Multiply by the i-th weight."""
    return lambda i: weights[i].linear(x, width, None, arithmetic)


def shared_jobs(hidden: int, copies: int, width: int, arithmetic: str) -> Jobs:
    """q/k/v and gate/up of a Llama: separate calls, one call, and one call with an adapter of rank 16 on each."""
    x, jobs = torch.randn(1, hidden), {}
    for name, shapes in (("q/k/v", (hidden, hidden // 4, hidden // 4)), ("gate/up", (hidden * 11 // 4,) * 2)):
        sets = [[Prepared(random_planes(n, hidden, i)) for n in shapes] for i in range(copies)]
        bundles = [Bundle(members) for members in sets]
        adapters = [Adapter(torch.randn(16, hidden), torch.randn(n, 16)) for n in shapes]
        size, none = sum(p.planes.nbytes(width) for p in sets[0]), (None,) * len(shapes)
        more = size + sum(adapter.nbytes() for adapter in adapters)
        widths = (width,) * len(shapes)
        jobs |= {
            f"{name} {width} bits, separate": (
                lambda i, sets=sets: [p.linear(x, width, None, arithmetic) for p in sets[i]], copies, size),
            f"{name} {width} bits, one call": (
                lambda i, b=bundles, w=widths, n=none: b[i].linear(x, w, n, arithmetic), copies, size),
            f"{name} {width} bits, one call and adapters": (
                lambda i, b=bundles, w=widths, n=none, a=adapters: b[i].linear(x, w, n, arithmetic, a), copies, more),
            f"{name} {width} bits, adapters by torch": (
                lambda i, sets=sets, a=adapters: [
                    p.linear(x, width, None, arithmetic) + one.product(x) for p, one in zip(sets[i], a, strict=True)
                ], copies, more),
        }  # fmt: skip
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shape", default="4096x4096", help="rows x columns of the layers with several widths")
    parser.add_argument("--hidden", type=int, default=2048, help="width of the model whose q/k/v and gate/up are timed")
    parser.add_argument("--arithmetic", default="int8", choices=["int8", "int16"])
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.set_grad_enabled(False)
    clock = clock_for(given.threads)
    rows, columns = map(int, given.shape.split("x"))
    jobs = column_jobs(rows, columns, 8, given.arithmetic)
    for width in (2, 4):
        jobs |= shared_jobs(given.hidden, 12, width, given.arithmetic)
    work = [Job(name, "polybit", *job) for name, job in jobs.items()]
    found = time_rounds(work, given.rounds, MemoryProbe(clock), clock)
    print(f"{'job':48} {'us':>8} {'MB':>6} {'GB/s':>6} {'of probe':>8}")
    for name, (_, _, size) in jobs.items():
        seconds, share = statistics.median(found[name].seconds), statistics.median(found[name].share)
        print(f"{name:48} {seconds * 1e6:8.1f} {size / 1e6:6.2f} {size / seconds / 1e9:6.1f} {share:8.0%}")
        if given.json:
            row = {"job": name, "microseconds": round(seconds * 1e6, 1), "bytes": size, "paired": round(share, 3)}
            with given.json.open("a", encoding="utf-8") as out:
                out.write(
                    json.dumps({**row, "threads": given.threads, "arithmetic": given.arithmetic, "machine": machine()})
                    + "\n"
                )


if __name__ == "__main__":
    main()
