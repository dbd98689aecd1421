"""Quantize a model that memory has no room for: does it finish under a limit, and end in the same bytes after kill -9?

A Llama of random bf16 weights is written shard by shard and never held. `polybit quantize --bits 4 --method gptq` then
runs on it in processes whose data is limited (RLIMIT_DATA, as `ulimit -d` sets it: all private memory a process may
write to, touched or not, so it is stricter than a limit on resident memory; files mapped for reading are not counted).
One run is left alone. Another is killed in a block drawn at random, and asked for again. Their files must be equal.

    python benchmarks/streamed.py [--shape 300m] [--limit 1.0] [--samples 8] [--window 128] [--json OUT] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polybit.core.runtime import write_json
from polybit.hub.checkpoint import split_shards
from polybit.hub.pieces import PIECE, write_pieces
from polybit.hub.random_model import Shape, skeleton
from polybit.hub.tiny import path as tinychat

SHAPES = {
    "10m": Shape(256, 6, 704, 4000, 4, 2),
    "100m": Shape(768, 12, 2048, 16000, 12, 4),
    "300m": Shape(1024, 20, 2816, 32000, 16, 4),
    "300m-4": Shape(1024, 4, 2816, 128256, 16, 4),  # as many weights, most of them at the ends
    "3b": Shape(3072, 28, 8192, 128256, 24, 8),  # Llama-3.2-3B, its head untied
    "3b-2": Shape(3072, 2, 8192, 128256, 24, 8),  # two blocks of it
}
SHARD_BYTES = 1 << 30
AGAIN = {"README.md", "run.json"}  # hold seconds; everything else is compared


def write_model(directory: Path, shape: Shape) -> int:
    """Write a random Llama with tinychat's tokenizer; the number of its weights."""
    model = skeleton(shape)
    directory.mkdir(parents=True)
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(directory)
    for file in tinychat().glob("*"):
        if "token" in file.name or file.name == "chat_template.jinja":
            shutil.copy(file, directory / file.name)
    tensors = {name: p.detach().to(torch.bfloat16) for name, p in model.named_parameters()}
    groups, table = split_shards(tensors, SHARD_BYTES), {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_pieces(directory / file, {n: tensors[n] for n in names}, drawn(model), {"format": "pt"})
        table |= dict.fromkeys(names, file)
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": table})
    return sum(t.numel() for t in tensors.values())


def drawn(model: nn.Module) -> Any:
    """Values of each weight in pieces: ones for norms, uniform of the size that keeps outputs as large as inputs."""

    def pieces(name: str) -> Iterator[Tensor]:
        shape = model.get_parameter(name).shape
        draw = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
        left = shape.numel()
        while left:
            size = min(left, PIECE)
            if len(shape) == 1:
                yield torch.ones(size, dtype=torch.bfloat16)
            else:
                yield torch.empty(size).uniform_(-1, 1, generator=draw).mul_((3 / shape[1]) ** 0.5).bfloat16()
            left -= size

    return pieces


class Limited:
    """One `polybit quantize` in a process of its own, its data limited."""

    def __init__(self, model: Path, out: Path, given: argparse.Namespace) -> None:
        words = [sys.executable, "-m", "polybit", "quantize", str(model), "--bits", "4", "--method", "gptq"]
        words += ["--calibration", "embedded", "--samples", str(given.samples), "--window", str(given.window)]
        words += ["--no-measure", "--out", str(out)]
        most = int(given.limit * 1e9)

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))

        self.started = time.perf_counter()
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(words, preexec_fn=limit, stdout=subprocess.DEVNULL, stderr=self.errors)

    def wait(self) -> dict[str, float]:
        """Seconds and peaks of the finished process; what it said where it failed."""
        peaks = {"VmData": 0, "VmHWM": 0}
        while self.process.poll() is None:
            for line in self.status():
                if line.split(":")[0] in peaks:
                    peaks[line.split(":")[0]] = max(peaks[line.split(":")[0]], int(line.split()[1]) * 1024)
            time.sleep(0.1)
        wall = time.perf_counter() - self.started
        if self.process.returncode:
            self.errors.seek(0)
            raise SystemExit(f"quantize ended with {self.process.returncode}: {self.errors.read()[-2000:]}")
        return {"seconds": wall, "data_bytes": peaks["VmData"], "resident_bytes": peaks["VmHWM"]}

    def status(self) -> list[str]:
        """What the system says of the process."""
        try:
            return Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        except OSError:
            return []


def killed(model: Path, out: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Kill a run at a random moment of a block drawn at random, then let it go on to its end."""
    draw = random.Random(given.seed)
    blocks = draw.randrange(1, SHAPES[given.shape].layers)
    partial = out.with_name(f"{out.name}.partial")
    run = Limited(model, out, given)
    while run.process.poll() is None and len(list(partial.glob("*.safetensors"))) < blocks:
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 0.5))
    if run.process.poll() is not None:
        raise SystemExit("the run ended before it could be killed: take a larger --shape")
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    done = len(list(partial.glob("*.safetensors")))
    return {"blocks_done": done, "went_on": Limited(model, out, given).wait()}


def digests(directory: Path) -> dict[str, str]:
    """sha256 of every file that must not depend on time."""
    found = {}
    for file in sorted(directory.iterdir()):
        if file.name in AGAIN:
            continue
        digest = hashlib.sha256()
        with file.open("rb") as handle:
            while piece := handle.read(1 << 22):
                digest.update(piece)
        found[file.name] = digest.hexdigest()
    return found


def main() -> None:
    """Write the model, run twice, compare, print what was measured."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--shape", choices=SHAPES, default="300m")
    words.add_argument("--limit", type=float, default=1.0, help="GB of data")
    words.add_argument("--samples", type=int, default=8)
    words.add_argument("--window", type=int, default=128)
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--json", type=Path)
    words.add_argument("--keep", type=Path, help="folder to work in, and to leave everything in")
    given = words.parse_args()
    folder = Path(tempfile.mkdtemp()) if given.keep is None else given.keep
    model = folder / given.shape
    try:
        weights = write_model(model, SHAPES[given.shape]) if not model.exists() else 0
        alone = Limited(model, folder / "alone", given).wait()
        print(json.dumps({"weights": weights, "alone": alone}), flush=True)
        again = killed(model, folder / "killed", given)
        one, other = digests(folder / "alone"), digests(folder / "killed")
        result = {"shape": given.shape, "weights": weights, "limit_bytes": given.limit * 1e9, "alone": alone,
                  "killed": again, "same_bytes": one == other, "files": len(one)}  # fmt: skip
        print(json.dumps(result))
        if given.json:
            write_json(given.json, result)
        raise SystemExit(one != other)
    finally:
        if given.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
