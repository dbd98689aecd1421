"""What `triton_gemv.tile_of` should choose on a GPU: `python -m polybit.speed.tiles_gpu 4096x4096 1 4,2 int8`.

Prints the time of every tile of one product at every width: rows x columns, tokens, widths, arithmetic.
"""

from __future__ import annotations

import statistics
import sys

import torch
from torch import Tensor

from polybit.core.runtime import PolybitError
from polybit.hub.random_model import random_planes
from polybit.kernels import ops
from polybit.speed.products_gpu import copied, copies_of, graphs, time_rounds, to_gpu, verify
from polybit.speed.timing import Job

TILES = {  # tokens -> (column blocks, warps)
    1: [(32, 2), (32, 4), (64, 4), (64, 8), (128, 4), (128, 8), (128, 16), (256, 16)],
    2: [(32, 2), (64, 4), (64, 8), (128, 8), (128, 16)],
    4: [(32, 2), (32, 4), (64, 4), (64, 8), (128, 16)],
}


def tile_jobs(rows: int, columns: int, tokens: int, width: int, arithmetic: str) -> list[Job]:
    """The kernel with every tile that fits, each verified first."""
    kernels = ops.gpu_kernels()
    if kernels is None or not torch.cuda.is_available():
        raise PolybitError("timing tiles needs an NVIDIA GPU, a torch built for it and triton")
    first = to_gpu(random_planes(rows, columns, 0))
    weights = [first, *(copied(first) for _ in range(copies_of(first.nbytes(width)) - 1))]
    x = torch.randn(tokens, columns, device="cuda", dtype=torch.float16)
    at_once = min(tokens, 4) if tokens != 3 else 4

    def job(wide: int, warps: int) -> Job:
        def call(i: int) -> Tensor:
            return kernels[0].linear(x, weights[i], width, None, arithmetic, tile=(at_once, wide, warps))

        verify(call(0), x, first, width, arithmetic)
        return Job(f"{wide} blocks, {warps} warps", "polybit", call, len(weights), first.nbytes(width))

    return [job(*tile) for tile in TILES[at_once]]


def main(shape: str, tokens: str, widths: str, arithmetic: str) -> None:
    """Time and print."""
    rows, columns = map(int, shape.split("x"))
    for width in map(int, widths.split(",")):
        jobs = tile_jobs(rows, columns, int(tokens), width, arithmetic)
        works, notes = graphs(jobs)
        found, _ = time_rounds(jobs, works, 15)
        print(f"{shape} w{width} {arithmetic}, {tokens} tokens", *notes, sep="\n")
        for job in jobs:
            timed = found[job.name]
            took, share = statistics.median(timed.seconds), statistics.median(timed.share)
            print(f"  {job.name:24} {1e6 * took:8.2f} µs  {share:.0%} of the probe")


if __name__ == "__main__":
    with torch.inference_mode():
        main(*sys.argv[1:])
