"""How fast one product is on a GPU: every width by the Triton kernels beside bf16 cuBLAS and torch's int4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear as dense

from polybit.core.planes import Planes
from polybit.core.runtime import PolybitError, track
from polybit.hub.random_model import random_planes
from polybit.kernels import ops
from polybit.measure.speed import GROUP
from polybit.measure.timing import Job, Timed, paired_ratio, summarize

BEYOND_CACHE = 256 << 20  # bytes read between two visits of the same matrix; larger than any L2
PROBE_BYTES = 1 << 30


def time_on_gpu(
    rows: int, columns: int, tokens: int, widths: Sequence[int], modes: Sequence[Any], rounds: int, *, peers: bool
) -> dict[str, Any]:
    """Rows for a table, timed by the GPU's own events in interleaved rounds; refused where there is no GPU or triton.

    Calls are queued back to back, so that Python's share shows only where a kernel is shorter than its call.
    """
    if not torch.cuda.is_available():
        raise PolybitError("--device cuda needs an NVIDIA GPU and a torch built for it: leave it out to time the CPU")
    if ops.gpu_kernels() is None:
        raise PolybitError("--device cuda needs triton: run pip install 'polybit[gpu]'")
    verify()
    jobs = polybit_jobs(rows, columns, tokens, widths, modes)
    if peers:
        jobs += torch_jobs(rows, columns, tokens)
    found = time_rounds(jobs, rounds)
    table = summarize(jobs, found)
    for row in table:
        if row["engine"] == "polybit":
            row["ratio"] = {"of": "torch bf16", **paired_ratio(found, row["name"], "torch bf16")} if peers else None
    return {"rows": table, "threads": 0, "gpu": torch.cuda.get_device_name(0)}


def verify() -> None:
    """Equality before speed, on the GPU itself: both kernels against the slow twin at every width."""
    for tokens in (1, 40):
        stored, x = to_gpu(random_planes(96, 256, 0)), torch.randn(tokens, 256, device="cuda")
        for width in range(1, 9):
            fast = ops.linear(x, stored, width, activations="int16")
            slow = ops.linear(x.double().float(), stored, width, activations="float")
            error = float((fast - slow).abs().max() / slow.abs().max())
            if not error < 1e-3:
                raise PolybitError(
                    f"the GPU kernel at {width} bits and {tokens} tokens is off by {error:.1e}: please report it with "
                    f"the GPU's name ({torch.cuda.get_device_name(0)}); its speed is not worth measuring"
                )


def polybit_jobs(rows: int, columns: int, tokens: int, widths: Sequence[int], modes: Sequence[Any]) -> list[Job]:
    """The operator at every width and kind of activation."""
    first = to_gpu(random_planes(rows, columns, 0))
    copies = max(2, -(-BEYOND_CACHE // first.nbytes(min(widths))))
    weights = [first, *(replace(first, planes=first.planes.clone()) for _ in range(min(copies, 32) - 1))]
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.float16)

    def job(width: int, mode: Any) -> Job:
        size = first.nbytes(width)
        name, bits = f"polybit w{width} {mode}", size * 8 / (rows * columns)

        def call(i: int) -> Tensor:
            return ops.linear(x, weights[i], width, activations=mode)

        return Job(name, "polybit", call, len(weights), size, 2 * rows * columns * tokens, bits)

    return [job(width, mode) for mode in modes for width in widths]


def torch_jobs(rows: int, columns: int, tokens: int) -> list[Job]:
    """cuBLAS in bf16 and torch's weight-only int4 kernel; what this GPU lacks is left out."""
    x, size = torch.randn(tokens, columns, device="cuda", dtype=torch.bfloat16), rows * columns
    weights = [torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16) for _ in range(copies_of(2 * size))]
    jobs = [Job("torch bf16", "torch", lambda i: dense(x, weights[i]), len(weights), 2 * size, 2 * size * tokens, 16.0)]
    try:
        codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
        packed = [torch.ops.aten._convert_weight_to_int4pack(codes, 8) for _ in range(copies_of(size // 2))]
        scale = torch.rand(columns // GROUP, rows, 2, device="cuda", dtype=torch.bfloat16)
        multiply = torch.ops.aten._weight_int4pack_mm
        multiply(x, packed[0], GROUP, scale)
    except RuntimeError:
        return jobs
    call: Callable[[int], Tensor] = lambda i: multiply(x, packed[i], GROUP, scale)  # noqa: E731
    return [*jobs, Job("torch int4pack", "torch", call, len(packed), size * 9 // 16, 2 * size * tokens, 4.5)]


def copies_of(size: int) -> int:
    """How many matrices of `size` bytes lie beyond the cache together."""
    return min(32, max(2, -(-BEYOND_CACHE // size)))


def time_rounds(jobs: Sequence[Job], rounds: int) -> dict[str, Timed]:
    """Every job in every round between two probes that read memory; seconds by the GPU's events."""
    buffer = torch.empty(PROBE_BYTES // 4, dtype=torch.float32, device="cuda").normal_()
    found = {job.name: Timed() for job in jobs}
    for job in jobs:
        for i in range(job.copies):
            job.call(i)
    for _ in track(range(rounds), "bench linear on the GPU"):
        before = PROBE_BYTES / seconds(lambda: buffer.sum())
        for job in jobs:
            took = seconds(lambda job=job: [job.call(i) for i in range(job.copies)]) / job.copies  # type: ignore[misc]
            after = PROBE_BYTES / seconds(lambda: buffer.sum())
            found[job.name].seconds.append(took)
            found[job.name].share.append(job.size / took / ((before + after) / 2))
            before = after
    return found


def seconds(work: Callable[[], Any]) -> float:
    """Seconds of queued GPU work, between two events."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def to_gpu(planes: Planes) -> Planes:
    """The same stored bytes on the GPU."""
    return replace(planes, planes=planes.planes.cuda(), scale=planes.scale.cuda())
