"""Ten minutes on a GPU: the tests that need one, the search for codes on real shapes, blocks of a real model.

    python benchmarks/card.py --out card [--device cuda] [--parts tests matrices blocks] [--workers 12] [--minutes 10]

Every part writes its rows to OUT/rows.jsonl as they are measured, with the card's name, and OUT/tests.log grows while
the tests run, so that a run that is cut off leaves what it found. Bars, of one H100 or H200: nested 4096 x 4096 in
1.5 s and 11008 x 4096 in 4 s; 36 blocks of Qwen3-8B's shape, reckoned from the blocks after the first, in 600 s with
8 GB of GPU memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import drawn
from benchmarks.streamed import write_model
from polybit.acts.quantize import quantize
from polybit.core.affine import Grid
from polybit.core.records import LayerStats
from polybit.hub.random_model import Shape
from polybit.options.quantize import QuantizeOptions
from polybit.quant.gptq import gptq
from polybit.quant.nested import nested
from polybit.quant.problem import layer_loss
from polybit.quant.rtn import rtn

SHAPES = {  # rows, columns
    "cuda": [(4096, 4096), (11008, 4096)],
    "cpu": [(256, 256)],  # to try the script
}
BLOCKS = {
    "cuda": (Shape(4096, 4, 12288, 151936, 32, 8), 36),  # Qwen3-8B, 4 of its 36 blocks
    "cpu": (Shape(128, 4, 352, 2000, 4, 2), 36),
}
METHODS = {
    "nested": lambda weight_OI, stats: nested(weight_OI, stats, Grid(8, 64, "group")),
    "gptq 3 bits": lambda weight_OI, stats: gptq(weight_OI, stats, Grid(3, 64, "group")),
    "rtn 3 bits": lambda weight_OI, stats: rtn(weight_OI, None, Grid(3, 64, "group")),
}
REPEATS = 3


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak(device: str) -> int:
    """Most bytes of the device's memory since the last question."""
    if device != "cuda":
        return 0
    found = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return found


def tests(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Tests that need a GPU; each failure is in OUT/tests.log as soon as it happens."""
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", str(given.workers), "--dist", "worksteal", "-v"]
    began = time.perf_counter()
    with (given.out / "tests.log").open("w") as log:
        limit = min(given.minutes * 60 / 3, 200)
        try:
            code = subprocess.run([*words, "--instafail"] if given.instafail else words, stdout=log, stderr=log,
                                  timeout=limit, env={**os.environ, "TRITON_INTERPRET": "0"}).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = None
    text = (given.out / "tests.log").read_text(errors="replace")
    yield {
        "part": "tests",
        "seconds": time.perf_counter() - began,
        "exit": code,
        "passed": text.count(" PASSED "),
        "failed": sorted({line.split("FAILED ")[1].split(" ")[0] for line in text.splitlines() if "FAILED " in line}),
    }


def matrices(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Seconds of a quantizer on one matrix, its memory, and its layer loss over that of rounding to nearest."""
    for rows, columns in SHAPES[given.device]:
        weight_OI, stats = drawn(rows, columns)
        weight_OI = weight_OI.to(given.device)
        stats = LayerStats(stats.hessian_II.to(given.device), stats.absmean_I.to(given.device), stats.tokens)
        plain = float(layer_loss(weight_OI, rtn(weight_OI, None, Grid(3, 64, "group")), stats))
        for name, made in METHODS.items():
            peak(given.device)
            seconds = []
            for _ in range(REPEATS + 1):  # the first compiles kernels
                began = time.perf_counter()
                q = made(weight_OI, stats)
                wait(given.device)
                seconds.append(time.perf_counter() - began)
            loss = float(layer_loss(weight_OI, q, stats, 3))
            yield {
                "part": "matrices",
                "method": name,
                "shape": [rows, columns],
                "first_seconds": seconds[0],
                "seconds": statistics.median(seconds[1:]),
                "bytes": peak(given.device),
                "loss_at_3_over_rtn": loss / plain,
            }


def blocks(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A nested file of a few blocks of random weights; seconds of a block are between the files of finished ones."""
    shape, every = BLOCKS[given.device]
    model = given.out / "model"
    if not model.exists():
        write_model(model, shape)
    peak(given.device)
    options = QuantizeOptions(
        out=given.out / "nested", device=given.device, calibration="embedded", samples=given.samples,
        window=given.window, measure=False, overwrite=True, restart=True,
    )  # fmt: skip
    times: list[float] = []
    began, watched = time.time(), given.out / "nested.partial"
    watcher = subprocess.Popen([sys.executable, "-c", WATCH, str(watched)], stdout=subprocess.PIPE, text=True)
    try:
        quantize(str(model), options)
    finally:
        watcher.terminate()
        times = sorted(float(line) for line in (watcher.communicate()[0] or "").split())
    gaps = [after - before for before, after in pairwise(times)][: shape.layers - 1]
    yield {
        "part": "blocks",
        "shape": [shape.hidden, shape.intermediate, shape.vocabulary],
        "tokens": given.samples * given.window,
        "seconds": time.time() - began,
        "first_block": times[0] - began if times else None,
        "later_blocks": gaps,
        "reckoned_blocks": every,
        "reckoned_seconds": every * statistics.median(gaps) if gaps else None,
        "gpu_bytes": peak(given.device),
    }


WATCH = """
import sys, time
from pathlib import Path
seen = set()
while True:
    for file in Path(sys.argv[1]).glob("*.safetensors"):
        if file.name not in seen:
            seen.add(file.name)
            print(time.time(), flush=True)
    time.sleep(0.02)
"""
PARTS = {"matrices": matrices, "blocks": blocks, "tests": tests}


def main() -> None:
    """Run the parts in order; rows come as they are measured."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--out", type=Path, required=True)
    words.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    words.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    words.add_argument("--workers", type=int, default=12)
    words.add_argument("--samples", type=int, default=64)
    words.add_argument("--window", type=int, default=512)
    words.add_argument("--minutes", type=float, default=10)
    words.add_argument("--instafail", action="store_true", help="with pytest-instafail: tracebacks as they happen")
    given = words.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name(0) if given.device == "cuda" else "cpu"
    began = time.perf_counter()
    with (given.out / "rows.jsonl").open("a") as rows:
        for name in given.parts:
            if time.perf_counter() - began > given.minutes * 60 * 0.7:
                print(f"{name} left out: {given.minutes:g} minutes are nearly over", file=sys.stderr)
                continue
            for row in PARTS[name](given):
                line = json.dumps({"card": card, **row})
                print(line, flush=True)
                rows.write(line + "\n")
                rows.flush()


if __name__ == "__main__":
    main()
