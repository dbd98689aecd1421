"""How fast one product is on a GPU: every width by the Triton kernels beside bf16 cuBLAS and torch's int4.

What Python costs per call is many times a small kernel's time, so every job is captured as a CUDA graph and replayed,
ours and the peers' alike; the time of plain calls from Python stands beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense

from polybit.core.planes import Planes
from polybit.core.runtime import PolybitError, track
from polybit.hub.random_model import random_planes
from polybit.kernels import ops, reference
from polybit.kernels.prepared import Prepared
from polybit.kernels.route import route
from polybit.speed.products import GROUP
from polybit.speed.timing import Job, Timed, paired_ratio, summarize

BEYOND_CACHE = 256 << 20  # bytes read between two visits of the same matrix; larger than any L2
PROBE_BYTES = 1 << 30
MOST_COPIES = 32
EAGER_ROUNDS = 5
ERROR = 2e-3  # of the largest output, above what rounding to float16 costs


def time_on_gpu(
    rows: int, columns: int, tokens: int, widths: Sequence[int], arithmetics: Sequence[Any], rounds: int, *, peers: bool
) -> dict[str, Any]:
    """Rows for a table, timed by the GPU's own events in interleaved rounds; refused without a GPU or triton."""
    if not torch.cuda.is_available():
        raise PolybitError("--device cuda needs an NVIDIA GPU and a torch built for it: leave it out to time the CPU")
    if ops.gpu_kernels() is None:
        raise PolybitError("--device cuda needs triton: run pip install 'polybit[gpu]'")
    jobs = polybit_jobs(rows, columns, tokens, widths, arithmetics)
    notes: list[str] = []
    if peers:
        theirs, notes = torch_jobs(rows, columns, tokens)
        jobs += theirs
    works, refused = graphs(jobs)
    found, eager = time_rounds(jobs, works, rounds)
    table = summarize(jobs, found)
    for row in table:
        row["eager_seconds"] = statistics.median(eager[row["name"]])
        if row["engine"] == "polybit":
            row["ratio"] = {"of": "torch bf16", **paired_ratio(found, row["name"], "torch bf16")} if peers else None
    return {"rows": table, "threads": 0, "gpu": torch.cuda.get_device_name(0), "notes": notes + refused}


def polybit_jobs(rows: int, columns: int, tokens: int, widths: Sequence[int], arithmetics: Sequence[Any]) -> list[Job]:
    """A layer's product at every width and arithmetic, each verified first."""
    first = to_gpu(random_planes(rows, columns, 0))
    weights = [first, *(copied(first) for _ in range(copies_of(first.nbytes(min(widths))) - 1))]
    layers = [Prepared(planes) for planes in weights]
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.float16)

    def job(width: int, arithmetic: Any) -> Job:
        size = first.nbytes(width)
        name, bits = f"polybit w{width} {arithmetic}", size * 8 / (rows * columns)

        def call(i: int) -> Tensor:
            return layers[i].linear(x, width, None, arithmetic)

        verify(call(0), x, first, width, arithmetic)
        return Job(name, "polybit", call, len(weights), size, 2 * rows * columns * tokens, bits)

    return [job(width, arithmetic) for arithmetic in arithmetics for width in widths]


def verify(y: Tensor, x: Tensor, planes: Planes, width: int, arithmetic: Any) -> None:
    """Equality before speed: what the kernel gave, against the slow twin on the same GPU."""
    rounded = route(arithmetic, "cuda", tokens=len(x)) == "few"
    slow = reference.linear(x.float(), planes, width, arithmetic=arithmetic if rounded else "float")
    error = float((y.float() - slow).abs().max() / slow.abs().max())
    if not error < ERROR:
        raise PolybitError(
            f"the GPU kernel at {width} bits with {arithmetic} arithmetic and {len(x)} tokens is off by {error:.1e}: "
            f"please report it with the GPU's name ({torch.cuda.get_device_name(0)}); its speed is not worth measuring"
        )


def torch_jobs(rows: int, columns: int, tokens: int) -> tuple[list[Job], list[str]]:
    """cuBLAS in bf16 and torch's weight-only int4 kernel; what this GPU or torch lacks is left out, with a note."""
    x, size = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16), rows * columns
    weights = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(copies_of(2 * size))]
    jobs = [Job("torch bf16", "torch", lambda i: dense(x, weights[i]), len(weights), 2 * size, 2 * size * tokens, 16.0)]
    try:
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
        packed = [torch.ops.aten._convert_weight_to_int4pack(codes, 8) for _ in range(copies_of(size // 2))]
        scale = torch.rand(columns // GROUP, rows, 2, device="cuda", dtype=torch.bfloat16)
        multiply = torch.ops.aten._weight_int4pack_mm
        multiply(x, packed[0], GROUP, scale)
        torch.cuda.synchronize()
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        return jobs, [f"torch int4pack is left out: {first_line(error)}"]
    call: Callable[[int], Tensor] = lambda i: multiply(x, packed[i], GROUP, scale)  # noqa: E731
    return [*jobs, Job("torch int4pack", "torch", call, len(packed), size * 9 // 16, 2 * size * tokens, 4.5)], []


def copies_of(size: int) -> int:
    """How many matrices of `size` bytes lie beyond the cache together."""
    return min(MOST_COPIES, max(2, -(-BEYOND_CACHE // size)))


def graphs(jobs: Sequence[Job]) -> tuple[dict[str, Callable[[], Any]], list[str]]:
    """The work of every job, all copies once, as a replayed CUDA graph; as plain calls, with a note, where it cannot
    be captured. Everything has run before it is captured, so that all kernels are built."""
    works, notes = {}, []
    for job in jobs:

        def calls(job: Job = job) -> None:
            for i in range(job.copies):
                job.call(i)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            calls()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                calls()
            works[job.name] = graph.replay
        except RuntimeError as error:
            torch.cuda.synchronize()
            works[job.name] = calls
            notes.append(f"{job.name} is timed without a CUDA graph: {first_line(error)}")
    return works, notes


def first_line(error: Exception) -> str:
    """What went wrong, short."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def time_rounds(
    jobs: Sequence[Job], works: dict[str, Callable[[], Any]], rounds: int
) -> tuple[dict[str, Timed], dict[str, list[float]]]:
    """Every job in every round between two probes that read memory, and in the first rounds called from Python too;
    seconds of one call by the GPU's events."""
    buffer = torch.empty(PROBE_BYTES // 4, dtype=torch.float32, device="cuda").normal_()

    def probe() -> float:
        return PROBE_BYTES / seconds(buffer.sum, buffer)

    found, eager = {job.name: Timed() for job in jobs}, {job.name: [] for job in jobs}  # type: ignore[var-annotated]
    for number in track(range(rounds), "bench linear on the GPU"):
        before = probe()
        for job in jobs:
            took = seconds(works[job.name], buffer) / job.copies
            after = probe()
            found[job.name].seconds.append(took)
            found[job.name].share.append(job.size / took / ((before + after) / 2))
            before = after
            if number < EAGER_ROUNDS:
                called = seconds(lambda job=job: [job.call(i) for i in range(job.copies)], buffer)  # type: ignore[misc]
                eager[job.name].append(called / job.copies)
    return found, eager


def seconds(work: Callable[[], Any], buffer: Tensor) -> float:
    """Seconds of GPU work between two events, queued while the GPU reads a large buffer: it starts without waiting for
    Python, and finds nothing of its own in the cache."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    buffer.sum()
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def to_gpu(planes: Planes) -> Planes:
    """The same stored bytes on the GPU."""
    return changed(planes, lambda tensor: tensor.cuda())


def copied(planes: Planes) -> Planes:
    """The same weight elsewhere in memory, everything that is read."""
    return changed(planes, lambda tensor: tensor.clone())


def changed(planes: Planes, change: Callable[[Tensor], Tensor]) -> Planes:
    """Planes with every tensor changed."""
    ratios = {
        width: table if table.index is None else replace(table, index=change(table.index))
        for width, table in planes.ratios.items()
    }
    return replace(
        planes,
        planes=change(planes.planes),
        scale=change(planes.scale),
        zero=change(planes.zero) if isinstance(planes.zero, Tensor) else planes.zero,
        ratios=ratios,
        column_scale=None if planes.column_scale is None else change(planes.column_scale),
    )
