"""docs/scale.md: machines, hours, memory, disk and bytes on the wire of each verb, from constants measured here.

    python -m benchmarks.scale --measure && python -m benchmarks.pages     # times the constants here, a minute
    python -m benchmarks.scale && python -m benchmarks.pages               # from the constants that are kept

Constants and what follows from them stand in docs/results/data/several-workers.json. The simulation of 64 workers gives
tasks out by the very loop of hub.workers; only the workers, their work and their deaths are made up, and time is a
number.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import io
import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from polybit.hub.crew import Seen, Word, greet
from polybit.hub.workers import Team, Where

DATA = Path(__file__).parent.parent / "docs" / "results" / "data" / "several-workers.json"
GB, HOUR = 1e9, 3600.0
NODE = 0.2  # of the deaths are those of a whole node
WIDTHS = 6  # of a nested file, of sensitivities, of an evaluation


@dataclass(frozen=True)
class Shape:
    """A decoder; experts: of a block, of which `active` see a token. heads · size of a head, as kv for keys."""

    name: str
    blocks: int
    hidden: int
    middle: int
    vocabulary: int
    queries: int
    kv: int
    experts: int = 1
    active: int = 1

    @property
    def layers(self) -> list[tuple[int, int, int]]:
        """(rows, columns, how many) of the weights of a block."""
        attention = [(self.queries, self.hidden, 1), (self.kv, self.hidden, 2), (self.hidden, self.queries, 1)]
        return [*attention, (self.middle, self.hidden, 2 * self.experts), (self.hidden, self.middle, self.experts)]

    @property
    def block(self) -> int:
        """Weights of a block."""
        return sum(rows * columns * count for rows, columns, count in self.layers)

    @property
    def weights(self) -> int:
        """Weights of all blocks."""
        return self.blocks * self.block

    @property
    def ends(self) -> int:
        """Weights of embedding and head."""
        return 2 * self.vocabulary * self.hidden

    @property
    def seen(self) -> int:
        """Weights one token is multiplied with, the head among them."""
        mlp = 3 * self.middle * self.hidden
        return self.weights - self.blocks * mlp * (self.experts - self.active) + self.ends // 2


SHAPES = [
    Shape("8 B", 32, 4096, 14336, 128256, 4096, 1024),
    Shape("70 B", 80, 8192, 28672, 128256, 8192, 1024),
    Shape("400 B MoE", 62, 5120, 3072, 151936, 8192, 1024, experts=136, active=8),
]


@dataclass(frozen=True)
class Machine:
    """What tables reckon with: cores and bytes of memory of a machine, bytes a second of its wire."""

    cores: int = 64
    memory: float = 512 * GB
    wire: float = 25e9 / 8


@dataclass(frozen=True)
class Constants:
    """Of one core of this machine.

    flops: float32 products · gram: the same for x xT of calibration · code, descend: seconds of a nested search, for a
    weight and for a weight times its columns · read: bytes a second of a product with one token · disk: bytes a second
    written and read back
    """

    flops: float
    gram: float
    code: float
    descend: float
    read: float
    disk: float


def measure() -> Constants:
    """Time them, CPU seconds of one thread."""
    import torch

    from polybit.core.affine import Grid
    from polybit.core.records import LayerStats
    from polybit.quant.table import QUANTIZERS

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(512, 2048, generator=generator), torch.randn(2048, 2048, generator=generator)
    flops = 2 * 512 * 2048 * 2048 / seconds(lambda: x @ w)
    gram = 2 * 512 * 2048 * 2048 / seconds(lambda: x.T @ x)
    v = torch.randn(8192, 4096, generator=generator)
    one = torch.randn(4096, generator=generator)
    read = v.numel() * 4 / seconds(lambda: v @ one)
    taken = []
    for rows, columns in ((512, 512), (512, 1024)):
        weight = torch.randn(rows, columns, generator=generator)
        inputs = torch.randn(2048, columns, generator=generator)
        stats = LayerStats(inputs.T @ inputs, inputs.abs().mean(0), 2048)
        work = partial(QUANTIZERS["nested"], weight, stats, Grid(8, 64, "group"), widths=(8, 6, 5, 4, 3, 2))
        taken.append((rows * columns, columns, seconds(work, least=2)))
    (size, columns, short), (twice, more, long) = taken
    descend = (long / twice - short / size) / (more - columns)
    with tempfile.NamedTemporaryFile() as file:
        began = time.monotonic()
        block = os.urandom(1 << 24)
        for _ in range(16):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        disk = 16 * len(block) / (time.monotonic() - began)
    return Constants(flops, gram, max(short / size - descend * columns, 0.0), max(descend, 0.0), read, disk)


def seconds(work: Callable[[], Any], *, least: int = 8) -> float:
    """CPU seconds of a call, the least of a few."""
    found = []
    for _ in range(least):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def quantize(s: Shape, c: Constants, m: Machine, tokens: int = 128 * 512) -> dict[str, float]:
    """One pass of text for Hessians and outputs, then nested codes; layers of a block are shared, blocks are not."""
    passes = 2 * s.seen * tokens / c.flops
    inputs = {columns: (1 if s.experts == 1 or columns != s.middle else s.active) for _, columns, _ in s.layers}
    grams = s.blocks * sum(tokens * share * columns**2 for columns, share in inputs.items()) / c.gram
    codes = s.blocks * sum(n * r * k * (c.code + c.descend * k) for r, k, n in s.layers)
    wire = s.blocks * sum(n * 4 * r * k for r, k, n in s.layers) + s.blocks * sum(4 * k * k for _, k, _ in s.layers)
    return {
        "core_hours": (passes + grams + codes) / HOUR,
        "alone": (passes + grams) / HOUR,  # core hours that one machine does, whatever the workers
        "ram": (2 * 4 * s.block + 8 * tokens * s.hidden + 8 * max(k for _, k, _ in s.layers) ** 2) / GB,
        "disk": (2 * s.weights * 8.4 / 8 + 4 * s.ends) / GB,
        "wire": wire / GB,
        "tasks": s.blocks * sum(n for _, _, n in s.layers),
    }


def allocate(s: Shape, c: Constants, m: Machine, tokens: int = 96 * 512, calibration: int = 128 * 512) -> dict:
    """Exact sensitivities: every layer of every block at 5 widths through all that follows, and the walk up to it."""
    widths, layers = 5, 7
    behind = s.seen * (s.blocks + 1) / 2 / s.blocks  # weights from a block on, on average
    forwards = s.blocks * layers * widths * 2 * behind * tokens
    walks = 2 * s.seen * (tokens + 2 * calibration)
    codes = s.blocks * widths * sum(n * r * k * (c.code + c.descend * k) for r, k, n in s.layers) / WIDTHS
    return {
        "core_hours": (forwards + walks) / c.flops / HOUR + codes / HOUR,
        "alone": 0.0,
        "ram": (4 * (s.weights + s.ends) + 4 * 2 * tokens * s.hidden) / GB,
        "disk": widths * s.weights / GB,
        "wire": (2 * (s.weights + s.ends) + widths * s.weights) / GB,
        "tasks": s.blocks,
    }


def pairs(s: Shape, c: Constants, m: Machine, prompts: int = 20000, answer: int = 256, batch: int = 32) -> dict:
    """Two models write `answer` tokens for every prompt, a batch reading its weights once a token, then one scores."""
    steps = prompts / batch * answer
    write = steps * (4 * s.seen / c.read + batch * 2 * s.seen / c.flops) * 2
    score = 2 * s.seen * prompts * answer * 2 / c.flops
    return {
        "core_hours": (write + score) / HOUR,
        "alone": 0.0,
        "ram": 2 * 4 * (s.weights + s.ends) / GB,
        "disk": prompts * answer * 64 * 6 / GB,
        "wire": (2 * (s.weights + s.ends) + prompts * answer * 64 * 6) / GB,
        "tasks": prompts / 512,
    }


def evaluate(s: Shape, c: Constants, m: Machine, tokens: int = 64 * 512) -> dict:
    """The float model once and the file at every width on the text."""
    return {
        "core_hours": 2 * s.seen * tokens * (1 + WIDTHS) / c.flops / HOUR,
        "alone": 0.0,
        "ram": (4 * (s.weights + s.ends) + s.weights * 8.4 / 8 + 4 * s.block) / GB,
        "disk": 0.0,
        "wire": (2 * (s.weights + s.ends) + s.weights * 8.4 / 8) / GB,
        "tasks": 64,
    }


def align(s: Shape, c: Constants, m: Machine, steps: int = 150, tokens: int = 16 * 256) -> dict:
    """Forward, again for the backward pass, and twice that for it; 21 bytes a weight, spread; its rows sent 3 times."""
    return {
        "core_hours": 8 * s.seen * tokens * steps / c.flops / HOUR,
        "alone": 0.0,
        "ram": 21 * s.weights / GB,  # of all processes together: float weight, latent, gradient, two moments, a code
        "disk": 3 * 12 * s.weights / GB,
        "wire": 3 * 4 * s.weights * steps / GB,
        "tasks": steps,
    }


VERBS = {"quantize": quantize, "allocate": allocate, "pairs": pairs, "eval": evaluate, "align": align}


NEEDS_ALL = ("pairs",)  # verbs that hold whole models, and do not go by blocks
TRAINS = ("align",)


def needs(c: Constants, m: Machine, day: float = 24.0) -> list[dict[str, Any]]:
    """A row per shape and verb: what it takes, and the machines that do it in a day."""
    rows = []
    for s in SHAPES:
        for verb, formula in VERBS.items():
            if verb in TRAINS and s.experts > 1:
                rows.append({"model": s.name, "verb": verb, "memory": "fused experts are not trained"})
                continue
            need = formula(s, c, m)
            per, fixed = need["core_hours"] / m.cores, need["alone"] / m.cores
            least = ceil(need["ram"] * GB / m.memory) if verb in TRAINS else 1  # spread; others load by themselves
            machines = max(least, ceil((per - fixed) / (day - fixed)))
            held = need["ram"] / (machines if verb in TRAINS else 1)
            fits = held * GB <= m.memory
            sent = need["wire"] * GB / m.wire / HOUR if verb in TRAINS and machines > 1 else 0.0
            rows.append(
                {
                    "model": s.name,
                    "verb": verb,
                    "core_hours": rounded(need["core_hours"]),
                    "machines": machines,
                    "hours": rounded(max(fixed + (per - fixed) / machines, sent)),
                    "memory": f"{rounded(held):,} GB"
                    + ("" if fits else ", too large" if verb in NEEDS_ALL else ", by blocks"),
                    "disk": rounded(need["disk"]),
                    "wire": rounded(need["wire"]),
                }
            )
    return rows


def rounded(value: float) -> float:
    """Two digits that count."""
    found = float(f"{value:.2g}")
    return int(found) if found == int(found) else found


class VirtualCrew:
    """Workers in time that passes only on paper: they start, load, work by the length of their task, and fail.

    The loop that gives them work is the real one of hub.workers. lives: mean seconds until a worker dies · nodes: of
    how many workers each; a node that dies takes all of its workers
    """

    def __init__(self, task_seconds: list[float], *, load: float, lives: float, nodes: int, seed: int = 0) -> None:
        self.task_seconds, self.load, self.lives, self.nodes = task_seconds, load, lives, nodes
        self.rng = random.Random(seed)
        self.now, self.number, self.deaths, self.busy = 0.0, 0, 0, 0.0
        self.events: list[tuple[float, int, str, Any]] = []
        self.alive: dict[int, bool] = {}

    def hire(self) -> int:
        """A worker that is here after it has loaded the model."""
        worker, self.number = self.number, self.number + 1
        self.alive[worker] = True
        heapq.heappush(self.events, (self.now + self.load, worker, "here", greet(Seen({}))))
        heapq.heappush(self.events, (self.now + self.rng.expovariate(1 / self.lives), worker, "gone", "died"))
        return worker

    def give(self, worker: int, task: int) -> None:
        """Done after the seconds of the task."""
        heapq.heappush(self.events, (self.now + self.task_seconds[task], worker, "done", task))

    def hear(self, _seconds: float) -> list[Any]:
        """The next thing that happens."""
        while self.events:
            self.now, worker, kind, what = heapq.heappop(self.events)
            if not self.alive.get(worker):
                continue
            if kind == "gone":
                self.deaths += 1
                first = worker - worker % self.nodes
                node = [w for w in range(first, first + self.nodes) if self.alive.get(w)]
                lost = node if self.rng.random() < NODE else [worker]
                for other in lost:
                    self.alive[other] = False
                return [Word(other, "gone", what, blame=False) for other in lost]
            if kind == "done":
                self.busy += self.task_seconds[what]
            return [Word(worker, kind, what)]
        return []

    def end(self) -> None:
        """Nobody to let go."""


def simulate(name: str, tasks: list[float], *, load: float, lives: float, workers: int = 64) -> dict[str, Any]:
    """Tasks of so many seconds done by workers that die, and by workers that do not; seconds it could take at best."""
    found: dict[str, Any] = {"what": name, "tasks": len(tasks), "workers": workers}
    best = max(sum(tasks) / workers, max(tasks)) + load
    for kind, mean in (("calm", 1e15), ("failing", lives)):
        crew = VirtualCrew(tasks, load=load, lives=mean, nodes=4)
        team = Team(int, (), Where(workers))
        team.crew = crew
        with contextlib.redirect_stderr(io.StringIO()):
            done = [number for number, _ in team.map(list(range(len(tasks))))]
        assert sorted(done) == list(range(len(tasks))), "a task was lost or done twice"
        found |= {f"{kind}_hours": round(crew.now / HOUR, 1), f"{kind}_deaths": crew.deaths}
    found["best_hours"] = round(best / HOUR, 1)
    found["over"] = round(found["failing_hours"] / found["calm_hours"], 2)
    return found


def simulated(c: Constants) -> list[dict[str, Any]]:
    """The 70 B model on 64 workers of 16 cores, each of which dies once in so many hours on average."""
    s, m, cores = SHAPES[1], Machine(), 16
    load = 2 * (s.weights + s.ends) / m.wire
    one = {verb: VERBS[verb](s, c, m)["core_hours"] * HOUR / cores for verb in ("pairs", "allocate")}
    shares = [s.blocks - n + 1 for n in range(s.blocks)]
    blocks = [one["allocate"] * share / sum(shares) for share in shares]
    shards = [one["pairs"] / 1250] * 1250
    return [
        simulate("pairs, 1,250 shards, a worker lives 24 hours", shards, load=load, lives=24 * HOUR),
        simulate("pairs, 1,250 shards, a worker lives 2 hours", shards, load=load, lives=2 * HOUR),
        simulate("sensitivities, 80 blocks, a worker lives 48 hours", blocks, load=load, lives=48 * HOUR),
    ]


COLUMNS = {
    "needs": [
        ["model", "{model}"], ["verb", "{verb}"], ["core hours", "{core_hours:,}", "–"],
        ["machines", "{machines}", "–"], ["hours", "{hours}", "–"], ["memory of each", "{memory}"],
        ["disk, GB", "{disk:,}", "–"], ["wire, GB", "{wire:,}", "–"],
    ],
    "simulation": [
        ["64 workers, 70 B", "{what}"], ["hours at best", "{best_hours}"], ["nobody dies", "{calm_hours}"],
        ["hours with deaths", "{failing_hours}"], ["deaths", "{failing_deaths}"], ["times longer", "{over}"],
    ],
    "constants": [["of one core", "{what}"], ["", "{value}"]],
}  # fmt: skip


def written(constants: Constants) -> dict[str, list[dict[str, Any]]]:
    """The rows of all tables."""
    c = constants
    rows = [
        {"what": "products in float32", "value": f"{c.flops / 1e9:.0f} GFLOP/s"},
        {"what": "x xᵀ of calibration", "value": f"{c.gram / 1e9:.0f} GFLOP/s"},
        {
            "what": "nested codes, a weight of I inputs",
            "value": f"{c.code * 1e6:.2f} µs + {c.descend * 1e9:.2f} ns · I",
        },
        {"what": "reading weights for one token", "value": f"{c.read / 1e9:.1f} GB/s"},
        {"what": "writing a file, to the disk", "value": f"{c.disk / 1e9:.2f} GB/s"},
    ]
    return {"constants": rows, "needs": needs(c, Machine()), "simulation": simulated(c)}


def main() -> None:
    """Measure where that is asked, and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--measure", action="store_true", help="time the constants on this machine")
    args = parser.parse_args()
    kept = json.loads(DATA.read_text(encoding="utf-8")) if DATA.is_file() else {"tables": {}}
    if args.measure:
        kept["constants"] = asdict(measure())
    for name, rows in written(Constants(**kept["constants"])).items():
        kept["tables"][name] = {"columns": COLUMNS[name], "rows": rows}
    DATA.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
