"""Time polybit::linear at every width beside a memory-bandwidth probe and torch's own kernels, interleaved.

The bandwidth of a shared machine drifts within seconds, so every timing is bracketed by two probes that read memory as
fast as the machine can, and reported as a share of them (`paired`, median over rounds); matrices are rotated so that
none is in the cache when its turn comes. With one thread the clock is the thread's own, which leaves out the time other
work on the machine held the core. Rows are appended to --json as one object a line.

    python benchmarks/bench_kernels.py --rounds 30 --threads 2 --json kernels.jsonl
    python benchmarks/bench_kernels.py --tokens 128        # prefill, in operations per second
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from polybit.core.planes import Planes
from polybit.core.records import machine
from polybit.kernels import cpu, ops, reference
from polybit.kernels.prepared import Prepared

GROUP = 64
clock = time.perf_counter  # main() takes the thread's own clock when there is one thread
BEYOND_CACHE = 80 << 20  # bytes read between two visits of the same matrix


def random_planes(rows: int, columns: int, seed: int) -> Planes:
    """A stored weight of random bits: speed does not depend on what they say."""
    draw = torch.Generator().manual_seed(seed)
    shape = (8, rows // 16, columns // 32, 64)
    planes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw)
    scale = torch.rand(rows // 16, columns // GROUP, 16, generator=draw).add_(0.1).half()
    return Planes(planes, scale, 127.5, 2.0**-8, (rows, columns), GROUP)


def verify() -> None:
    """Equality first: the fast path against the slow twin."""
    stored, x = random_planes(64, 256, 0), torch.randn(3, 256)
    for width in range(1, 9):
        for mode in ("int8", "int16"):
            fast = ops.linear(x, stored, width, activations=mode)
            slow = reference.linear(x.double(), stored, width, activations=mode, precision=torch.float64)
            assert float((fast - slow).abs().max() / slow.abs().max()) < 1e-6, (width, mode)


def polybit_jobs(rows: int, columns: int, tokens: int, widths: list[int], modes: list[str]) -> dict[str, tuple]:
    """name -> (call(i), number of matrices, bytes read per call)."""
    copies = max(3, -(-BEYOND_CACHE // (rows * columns * min(widths) // 8)))
    weights = [random_planes(rows, columns, i) for i in range(min(copies, 12))]
    prepared = [Prepared(weight) for weight in weights]  # as quantized layers call them
    x = torch.randn(tokens, columns)
    jobs = {}
    for mode in modes:
        for width in widths:

            def call(i: int, width: int = width, mode: str = mode) -> torch.Tensor:
                return prepared[i].linear(x, width, None, mode)

            jobs[f"polybit {width} bits {mode}"] = (call, len(weights), weights[0].nbytes(width))
    return jobs


def torch_jobs(rows: int, columns: int, tokens: int) -> dict[str, tuple]:
    """torch's bf16 product and its weight-only int8 and int4 kernels on bf16 activations, their fast case."""
    x = torch.randn(tokens, columns, dtype=torch.bfloat16)
    size = rows * columns
    dense = [torch.randn(rows, columns, dtype=torch.bfloat16) for _ in range(-(-BEYOND_CACHE // (size * 2)) + 1)]
    int8 = [torch.randint(-127, 127, (rows, columns), dtype=torch.int8) for _ in range(-(-BEYOND_CACHE // size) + 1)]
    int8_scale = torch.rand(rows, dtype=torch.bfloat16)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    int4 = [
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1) for _ in range(-(-BEYOND_CACHE // (size // 2)) + 1)
    ]
    int4_scale = torch.rand(columns // GROUP, rows, 2, dtype=torch.bfloat16)
    int4pack = torch.ops.aten._weight_int4pack_mm_for_cpu
    return {
        "torch bf16": (lambda i: torch.nn.functional.linear(x, dense[i]), len(dense), size * 2),
        "torch int8pack": (lambda i: torch.ops.aten._weight_int8pack_mm(x, int8[i], int8_scale), len(int8), size),
        "torch int4pack": (lambda i: int4pack(x, int4[i], GROUP, int4_scale), len(int4), size * 9 // 16),
    }


class Probe:
    """Reads a large buffer as fast as all threads can; bytes per second."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(256 << 20, dtype=torch.uint8).random_()
        self.library = cpu.library()

    def __call__(self) -> float:
        assert self.library is not None
        begin = clock()
        self.library.read(0, self.buffer.data_ptr(), self.buffer.numel() // 4)
        return self.buffer.numel() // 4 / (clock() - begin)


def time_rounds(jobs: dict[str, tuple], rounds: int, probe: Callable[[], float]) -> dict[str, dict[str, list[float]]]:
    """Seconds per call and share of the probes, round by round, all jobs in every round."""
    found: dict[str, dict[str, list[float]]] = {name: {"seconds": [], "share": []} for name in jobs}
    for call, copies, _ in jobs.values():
        for i in range(copies):
            call(i)
    for _ in range(rounds):
        before = probe()
        for name, (call, copies, size) in jobs.items():
            begin = clock()
            for i in range(copies):
                call(i)
            seconds = (clock() - begin) / copies
            after = probe()
            found[name]["seconds"].append(seconds)
            found[name]["share"].append(size / seconds / ((before + after) / 2))
            before = after
    return found


def peak() -> float:
    """8-bit multiply-adds per second of the registers alone, counted as two operations each; all threads."""
    library = cpu.library()
    assert library is not None
    best = 0.0
    for _ in range(5):
        begin = clock()
        done = library.multiply(0, 6_000_000)
        best = max(best, done / (clock() - begin))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--shape", default="4096x4096", help="rows x columns")
    parser.add_argument("--widths", default="2,3,4,5,6,8")
    parser.add_argument("--modes", default="int8,int16")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    global clock
    clock = time.thread_time if given.threads == 1 else time.perf_counter
    torch.set_grad_enabled(False)
    verify()
    rows, columns = map(int, given.shape.split("x"))
    jobs = polybit_jobs(rows, columns, given.tokens, [int(b) for b in given.widths.split(",")], given.modes.split(","))
    if not given.no_peers:
        jobs |= torch_jobs(rows, columns, given.tokens)
    found = time_rounds(jobs, given.rounds, Probe())
    ceiling = peak()
    operations = 2 * rows * columns * given.tokens
    print(f"{'kernel':24} {'us':>8} {'p20':>8} {'p80':>8} {'GB/s':>6} {'of probe':>8} {'of int8 peak':>12}")
    for name, (_, _, size) in jobs.items():
        seconds = sorted(found[name]["seconds"])
        middle = statistics.median(seconds)
        low, high = seconds[len(seconds) // 5], seconds[-1 - len(seconds) // 5]
        share = statistics.median(found[name]["share"])
        row = {
            "kernel": name,
            "rows": rows,
            "columns": columns,
            "tokens": given.tokens,
            "threads": given.threads,
            "group_size": GROUP,
            "rounds": given.rounds,
            "microseconds": round(middle * 1e6, 1),
            "p20": round(low * 1e6, 1),
            "p80": round(high * 1e6, 1),
            "bytes": size,
            "paired": round(share, 3),
            "of_int8_peak": round(operations / middle / ceiling, 3),
        }
        print(
            f"{name:24} {row['microseconds']:8.1f} {row['p20']:8.1f} {row['p80']:8.1f} {size / middle / 1e9:6.1f} "
            f"{share:8.0%} {row['of_int8_peak']:12.0%}"
        )
        if given.json:
            with given.json.open("a", encoding="utf-8") as out:
                out.write(json.dumps({**row, "machine": machine()}) + "\n")


if __name__ == "__main__":
    main()
