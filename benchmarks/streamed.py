"""Verbs on a model that memory has no room for: do they finish under a limit, and end in the same after kill -9?

A Llama of random bf16 weights is written shard by shard and never held. Each verb then runs on it in processes whose
address space is limited to less than the model has in float32 (RLIMIT_AS, as `ulimit -v` sets it: libraries, a
gigabyte, mapped files and memory that was never touched count too), or with --data private memory (RLIMIT_DATA, as
`ulimit -d` sets it, for models that are no larger than the libraries). One run is left alone; another is killed by
kill -9 in its middle, and asked for again. What they write must be equal. `export` and `eval` read the checkpoint that
`quantize` wrote.

    python benchmarks/streamed.py [--shape 500m] [--limit 1.8] [--verbs quantize eval export] [--keep FOLDER]
    python benchmarks/streamed.py --shape 3b --limit 6 --once       # the killed runs alone
    python benchmarks/streamed.py --shape 100m --beside             # CPU seconds beside the same in memory
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
    "200m": Shape(1024, 16, 2816, 8000, 16, 4),
    "500m": Shape(1024, 36, 2816, 8000, 16, 4),
    "300m": Shape(1024, 20, 2816, 32000, 16, 4),
    "300m-4": Shape(1024, 4, 2816, 128256, 16, 4),  # as many weights, most of them at the ends
    "3b": Shape(3072, 28, 8192, 128256, 24, 8),  # Llama-3.2-3B, its head untied
    "3b-2": Shape(3072, 2, 8192, 128256, 24, 8),  # two blocks of it
}
SHARD_BYTES = 1 << 28
LINUX = sys.platform.startswith("linux")  # where private memory is limited
TASK = "task.txt"  # a text beside the model for `mix`
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
    (directory / TASK).write_text("\n".join(f"Number {i} is {i * i} in squares, {i + i} in pairs." for i in range(999)))
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


class Verb:
    """A command line, what it leaves while it works (counted until it is killed), and what it writes."""

    def __init__(self, words: str, leaves: str, writes: str) -> None:
        self.words, self.leaves, self.writes = words.split(), leaves, writes


TEXT = "--general embedded --samples SAMPLES --window WINDOW --calibration-samples SAMPLES --widths 3,4 --method rtn"
VERBS = {
    "quantize": Verb(
        "quantize MODEL --bits 4 --method METHOD --calibration embedded --samples SAMPLES --window WINDOW --no-measure "
        "--out OUT/checkpoint",
        "checkpoint.partial/*.safetensors",
        "checkpoint",
    ),
    "exact": Verb(
        f"allocate MODEL --bits 3.5 {TEXT} --cache OUT/exact --out OUT/exact.json", "exact/*/*.npz", "exact.json"
    ),
    "gradient": Verb(
        f"allocate MODEL --bits 3.5 {TEXT} --sensitivity gradient --cache OUT/gradient --out OUT/gradient.json",
        "gradient/*/*.npz",
        "gradient.json",
    ),
    "mix": Verb(
        "mix MODEL --general embedded --tasks TASK --samples SAMPLES --window WINDOW --json OUT/mix.json",
        "",
        "mix.json",
    ),
    "columns": Verb(
        "columns MODEL --bits 3.5 --calibration embedded --samples SAMPLES --window WINDOW --method METHOD "
        "--out OUT/columns.json",
        "",
        "columns.json",
    ),
    "eval": Verb(
        "eval OUT/checkpoint --reference MODEL --text embedded-test --windows SAMPLES --window WINDOW --answers 0 "
        "--json OUT/eval.json",
        "",
        "eval.json",
    ),
    "export": Verb("export OUT/checkpoint --to compressed-tensors --windows 0 --out OUT/export", "", "export"),
}  # fmt: skip
DEFAULT = ["quantize", "exact", "gradient", "eval", "export"]

WHOLE = """
import sys
from polybit.acts import quantize
from polybit.cli import main
streamed = quantize.open_float
quantize.open_float = lambda name, options, whole: streamed(name, options, whole=True)
main(sys.argv[1:])
"""


class Limited:
    """One verb in a process of its own, its address space limited; whole: the model in memory, and no limit."""

    def __init__(self, verb: str, model: Path, out: Path, given: argparse.Namespace, *, whole: bool = False) -> None:
        places = {"MODEL": str(model), "SAMPLES": str(given.samples), "WINDOW": str(given.window)}
        places |= {"METHOD": given.method, "TASK": str(model / TASK)}
        words = [places.get(word, word).replace("OUT", str(out)) for word in VERBS[verb].words]
        words += [] if whole or verb == "export" else ["--memory", str(given.memory or given.limit / 8)]
        most = int(given.limit * 1e9)

        def confine() -> None:
            if not whole:
                resource.setrlimit(resource.RLIMIT_DATA if given.data else resource.RLIMIT_AS, (most, most))

        self.verb, self.peaks = verb, dict.fromkeys(("VmPeak", "VmData", "VmHWM"), 0)
        self.started, self.cpu = time.perf_counter(), 0.0
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            [sys.executable, *(["-c", WHOLE] if whole else ["-m", "polybit"]), *words],
            preexec_fn=confine,
            stdout=subprocess.DEVNULL,
            stderr=self.errors,
        )

    def look(self) -> bool:
        """Note the peaks; whether it still works."""
        if self.process.returncode is not None:
            return False
        try:
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        except OSError:
            lines = []
        for line in lines:
            name = line.split(":")[0]
            if name in self.peaks:
                self.peaks[name] = max(self.peaks[name], int(line.split()[1]) * 1024)
        pid, status, used = os.wait4(self.process.pid, os.WNOHANG)
        if not pid:
            time.sleep(0.1)
            return True
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.cpu = used.ru_utime + used.ru_stime
        return False

    def wait(self) -> dict[str, float]:
        """Seconds and peaks of the finished process; what it said where it failed."""
        while self.look():
            pass
        wall = time.perf_counter() - self.started
        if self.process.returncode:
            self.errors.seek(0)
            raise SystemExit(f"{self.verb} ended with {self.process.returncode}: {self.errors.read()[-2000:]}")
        gb = {name: round(value / 1e9, 2) for name, value in self.peaks.items()}
        return {"seconds": round(wall, 1), "cpu_seconds": round(self.cpu, 1), **gb}

    def kill(self) -> None:
        """kill -9."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


def killed(verb: str, model: Path, out: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Kill a run in its middle, then let it go on to its end."""
    leaves = VERBS[verb].leaves
    run = Limited(verb, model, out, given)
    wanted = random.Random(given.seed).randrange(1, SHAPES[given.shape].layers)
    while run.look():
        there = len(list(out.glob(leaves))) >= wanted if leaves else time.perf_counter() - run.started > given.after
        if there:
            run.kill()
            done = len(list(out.glob(leaves))) if leaves else None
            return {"blocks_done": done, "went_on": Limited(verb, model, out, given).wait()}
    run.wait()
    raise SystemExit(f"{verb} ended before it could be killed: take a larger --shape, or a smaller --after")


def written(path: Path) -> dict[str, Any]:
    """What a verb wrote, without what depends on time: sha256 of every file of a directory, or numbers."""
    if path.is_file():
        found = json.loads(path.read_text())
        return found.get("numbers", found)
    found = {}
    for file in sorted(path.iterdir()):
        if file.name in AGAIN:
            continue
        digest = hashlib.sha256()
        with file.open("rb") as handle:
            while piece := handle.read(1 << 22):
                digest.update(piece)
        found[file.name] = digest.hexdigest()
    return found


def measured(verb: str, model: Path, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One verb: beside itself in memory, or alone and killed."""
    alone, other = folder / "alone", folder / "other"
    found: dict[str, Any] = {"verb": verb, "shape": given.shape, "limit_gb": given.limit}
    if given.beside:
        runs = [Limited(verb, model, out, given, whole=out == alone).wait() for out in (alone, other)]
        ratio = round(runs[1]["cpu_seconds"] / runs[0]["cpu_seconds"], 2)
        return found | {"memory": runs[0], "streamed": runs[1], "ratio": ratio}
    if given.once:
        return found | {"killed": killed(verb, model, other, given)}
    found["alone"] = Limited(verb, model, alone, given).wait()
    given.after = found["alone"]["seconds"] * 0.6
    found["killed"] = killed(verb, model, other, given)
    one, two = (written(out / VERBS[verb].writes) for out in (alone, other))
    return found | {"same": one == two}


def main() -> None:
    """Write the model, run every verb, compare, print what was measured."""
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--shape", choices=SHAPES, default="500m")
    words.add_argument("--limit", type=float, default=1.8, help="GB of address space")
    words.add_argument("--data", action="store_true", help="limit private memory instead")
    words.add_argument("--memory", type=float, help="GB that a verb is told to keep to (default: an eighth of --limit)")
    words.add_argument("--verbs", nargs="+", choices=VERBS, default=DEFAULT)
    words.add_argument("--method", default="rtn", help="quantizer of quantize")
    words.add_argument("--samples", type=int, default=4)
    words.add_argument("--window", type=int, default=128)
    words.add_argument("--after", type=float, default=30.0, help="seconds to kill at, where nothing is left to count")
    words.add_argument("--once", action="store_true", help="the killed runs alone")
    words.add_argument("--beside", action="store_true", help="in memory and streamed, nothing is killed")
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--json", type=Path)
    words.add_argument("--keep", type=Path, help="folder to work in, and to leave everything in")
    given = words.parse_args()
    folder = Path(tempfile.mkdtemp()) if given.keep is None else given.keep
    model = folder / given.shape
    for name in ("alone", "other"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    try:
        if not model.exists():
            print(json.dumps({"weights": write_model(model, SHAPES[given.shape])}), flush=True)
        rows = []
        for verb in given.verbs:
            rows.append(measured(verb, model, folder, given))
            print(json.dumps(rows[-1]), flush=True)
        if given.json:
            write_json(given.json, {"rows": rows})
        raise SystemExit(not all(row.get("same", True) for row in rows))
    finally:
        if given.keep is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
