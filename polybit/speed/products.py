"""How fast one product is: every width beside a bandwidth probe, torch's own kernels and llama.cpp's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense

from polybit.core.memory import collapse
from polybit.core.records import processor_name
from polybit.core.runtime import PolybitError
from polybit.hub.random_model import random_planes
from polybit.kernels import ops, reference
from polybit.kernels.prepared import Prepared
from polybit.speed.machine import Constants, today
from polybit.speed.timing import (
    BEYOND_CACHE,
    Job,
    MemoryProbe,
    against_peers,
    clock_for,
    int8_peak,
    summarize,
    time_rounds,
)

GROUP = 64
MOST_COPIES = 12


def time_on_cpu(
    rows: int,
    columns: int,
    tokens: int,
    widths: Sequence[int],
    arithmetics: Sequence[ops.Arithmetic],
    rounds: int,
    *,
    peers: bool,
) -> dict[str, Any]:
    """Rows for a table, and the peak of 8-bit products; what is timed was verified first."""
    verify()
    clock = clock_for(torch.get_num_threads())
    jobs = polybit_jobs(rows, columns, tokens, widths, arithmetics)
    if peers:
        jobs += torch_jobs(rows, columns, tokens)
    probe = MemoryProbe(clock)
    peak = int8_peak(clock)
    found = time_rounds(jobs, rounds, probe, clock, "bench linear")
    peak = max(peak, int8_peak(clock))  # right after torch's products its threads may still be spinning
    table = against_peers(summarize(jobs, found, peak), found)
    return {"rows": table, "int8_peak": peak, "threads": torch.get_num_threads()}


def constants(numbers: Mapping[str, Any], widths: Sequence[int], arithmetic: str) -> Constants:
    """The machine's constants from what `time_on_cpu` measured with one token; what is in the cache of half the width
    is not counted as bandwidth.
    """
    by_name = {row["name"]: row for row in numbers["rows"]}
    kept = [(b, by_name[f"polybit w{b} {arithmetic}"]) for b in widths]
    efficiency = {b: round(row["paired_share"], 4) for b, row in kept}
    bandwidth = sorted(row["gigabytes_per_second"] * 1e9 / row["paired_share"] for _, row in kept)[len(kept) // 2]
    return Constants(
        processor_name(),
        numbers["threads"],
        today(),
        bandwidth,
        efficiency,
        call_overhead(20, clock_for(numbers["threads"])),
        int8_peak=numbers["int8_peak"],
        notes={"arithmetic": arithmetic},
    )


def verify() -> None:
    """Equality before speed: the fast path against the slow twin, at every width."""
    stored, x = random_planes(64, 256, 0), torch.randn(3, 256)
    arithmetics: tuple[ops.Arithmetic, ...] = ("int8", "int16")
    for width in range(1, 9):
        for arithmetic in arithmetics:
            fast = ops.linear(x, stored, width, arithmetic=arithmetic)
            slow = reference.linear(x.double(), stored, width, arithmetic=arithmetic, precision=torch.float64)
            error = float((fast - slow).abs().max() / slow.abs().max())
            if not error < 1e-6:
                raise PolybitError(
                    f"the kernel at {width} bits with {arithmetic} arithmetic is off by {error:.1e} on this machine: "
                    "please report it with the name of your processor; its speed is not worth measuring"
                )


def polybit_jobs(
    rows: int, columns: int, tokens: int, widths: Sequence[int], arithmetics: Sequence[ops.Arithmetic]
) -> list[Job]:
    """The product at every width and arithmetic, through the call that quantized layers make."""
    if columns % GROUP:
        raise PolybitError(f"a matrix with {columns} columns cannot be timed: give a multiple of {GROUP}")
    copies = min(MOST_COPIES, max(3, -(-BEYOND_CACHE // (rows * columns * min(widths) // 8))))
    weights = [random_planes(rows, columns, i) for i in range(copies)]
    prepared = [Prepared(weight) for weight in weights]
    x = torch.randn(tokens, columns)

    def job(width: int, arithmetic: ops.Arithmetic) -> Job:
        def call(i: int) -> Tensor:
            return prepared[i].linear(x, width, None, arithmetic)

        size = weights[0].nbytes(width)
        name = f"polybit w{width} {arithmetic}"
        return Job(name, "polybit", call, copies, size, 2 * rows * columns * tokens, size * 8 / (rows * columns))

    return [job(width, arithmetic) for arithmetic in arithmetics for width in widths]


def torch_jobs(rows: int, columns: int, tokens: int) -> list[Job]:
    """torch's bf16 product and its weight-only int8 and int4 kernels on bf16 activations, their fast case.

    A kernel this torch or this processor lacks is left out.
    """
    x = torch.randn(tokens, columns, dtype=torch.bfloat16)
    size = rows * columns

    def copies(total: int) -> int:
        return min(MOST_COPIES, -(-BEYOND_CACHE // total) + 1)

    def bf16() -> tuple[Callable[[int], Tensor], int]:
        weights = [torch.randn(rows, columns).bfloat16() for _ in range(copies(2 * size))]
        return (lambda i: dense(x, weights[i])), len(weights)

    def int8pack() -> tuple[Callable[[int], Tensor], int]:
        weights = [torch.randint(-127, 127, (rows, columns), dtype=torch.int8) for _ in range(copies(size))]
        scale = torch.rand(rows, dtype=torch.bfloat16)
        return (lambda i: torch.ops.aten._weight_int8pack_mm(x, weights[i], scale)), len(weights)

    def int4pack() -> tuple[Callable[[int], Tensor], int]:
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
        convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        weights = [convert(codes, 1) for _ in range(copies(size // 2))]
        scale = torch.rand(columns // GROUP, rows, 2, dtype=torch.bfloat16)
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        return (lambda i: multiply(x, weights[i], GROUP, scale)), len(weights)

    found = []
    for name, make, bits in (("bf16", bf16, 16.0), ("int8pack", int8pack, 8.0), ("int4pack", int4pack, 4.5)):
        try:
            call, number = make()
            call(0)
        except (RuntimeError, AttributeError):
            continue
        found.append(Job(f"torch {name}", "torch", call, number, int(size * bits / 8), 2 * size * tokens, bits))
        collapse_all(call)
    return found


def collapse_all(call: Callable[[int], Tensor]) -> None:
    """Large pages for every weight a job reads, ours and theirs alike."""
    for cell in call.__closure__ or ():
        if isinstance(cell.cell_contents, list):
            for weight in cell.cell_contents:
                collapse(weight)


def call_overhead(rounds: int, clock: Callable[[], float]) -> float:
    """Seconds a product of one token costs beside reading its weight: the call on a matrix that is in the cache."""
    tiny = Prepared(random_planes(64, 64, 0))
    x, best = torch.randn(1, 64), float("inf")
    for _ in range(rounds):
        begin = clock()
        for _ in range(100):
            tiny.linear(x, 4, None, "int16")
        best = min(best, (clock() - begin) / 100)
    return best
