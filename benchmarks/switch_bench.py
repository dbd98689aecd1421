"""Models, rows to train and to measure on, starting codes and single runs of the benchmarks of switchable training.

Two models: tinychat, the embedded one (conversations of its generator; a reply is right when every token is), and any
other one by its path with a file of conversations, such as tinytalk with soda_chat (no right answers: nats per token
of the human replies, and KL to the float model). No held-out row shares a name, or a conversation, with the training
rows; validation rows, for choosing settings, are neither.

What takes long to prepare (tokens of the training rows, starting codes) is kept in DATA and found there by later runs.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from polybit.core.affine import QWeight
from polybit.core.planes import unpack
from polybit.core.runtime import atomic_path
from polybit.data import synth
from polybit.data.lessons import Lesson, Lessons, conversation_lesson, gather, read_lessons
from polybit.hub.load import load
from polybit.hub.models import resolve
from polybit.nn.switch import panel
from polybit.train.balance import Balance
from polybit.train.cascade import Cascade
from polybit.train.fit import Course
from polybit.train.latent import Freedom, make_trainable
from polybit.train.schedules import every
from polybit.train.switchable import rows_of, run

LENGTH, TRAIN_ROWS = 256, 2000
SEEDS = {"test": 77, "validation": 78}
SHARES = {"train": 0.5, "validation": 0.12, "test": 0.38}  # of the conversations of a file
BATCH, RATE = 4, 3e-4
FREEDOM = Freedom(others="norms", margin=0.5)


class Bench:
    """One model with its rows; `data` is where prepared material is found and kept."""

    def __init__(
        self,
        data: Path,
        *,
        model: str = "tinychat",
        chats: Path | None = None,
        items: int = 60,
        part: str = "test",
        device: torch.device | None = None,
    ) -> None:
        data.mkdir(parents=True, exist_ok=True)
        self.data, self.model, self.chats = data, model, chats
        self.name = Path(model).name.split("-")[0]
        self.device = device or torch.device("cpu")
        self.teacher, self.tokenizer = self.load()
        self.teacher.to(self.device)
        self.length = min(LENGTH, getattr(self.teacher.config, "max_position_embeddings", LENGTH))
        self.held_out = self.items(items, part) if chats is None else self.conversations(part)

    def load(self) -> tuple[Any, Any]:
        """The float model and its tokenizer."""
        return load(resolve(self.model))

    def items(self, count: int, part: str) -> Lessons:
        """Questions of the embedded tasks with their answers."""

        def draw() -> list[Lesson]:
            drawn = [item for task in synth.TASKS for item in synth.items(task, count, SEEDS[part], split="test")]
            talks = [[*item.messages, {"role": "assistant", "content": item.answer}] for item in drawn]
            rows = [conversation_lesson([dict(m) for m in talk], self.tokenizer) for talk in talks]
            return [row for row in rows if len(row.ids) <= self.length]

        return kept_rows(self.data / f"{self.name}-{part}-{count}.npz", draw)

    def conversations(self, part: str) -> Lessons:
        """The conversations of a part of the file; what the assistant says is learnt."""
        assert self.chats is not None
        talks = read_chats(self.chats)
        Random(0).shuffle(talks)
        cuts = np.cumsum([0, *(round(share * len(talks)) for share in SHARES.values())])
        place = list(SHARES).index(part)
        chosen = talks[cuts[place] : cuts[place + 1]]
        return gather([conversation_lesson(talk, self.tokenizer) for talk in chosen], self.length, str(self.chats))

    def lessons(self, seed: int, count: int = TRAIN_ROWS) -> Lessons:
        """Conversations to train on: of the embedded model drawn anew for each seed, else the file's training part."""
        if self.chats is not None:
            return self.conversations("train")

        def draw() -> list[Lesson]:
            return read_lessons("embedded", self.tokenizer, length=self.length, count=count, seed=seed).rows

        return kept_rows(self.data / f"{self.name}-rows-{count}-{seed}.npz", draw)

    def start(self, flags: str) -> dict[str, QWeight]:
        """Codes that `polybit quantize MODEL` makes with these flags, made once."""
        label = re.sub(r"[^a-z0-9]+", "_", flags.lower()).strip("_")
        path = self.data / f"{self.name}-start-{label}.npz"
        if not path.is_file():
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "made"
                chosen = [*flags.split(), "--samples", "64", "--no-measure", "--out", str(out)]
                command = [sys.executable, "-m", "polybit", "quantize", self.model, *chosen]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                layers = panel(load(out)[0]).layers
                keep(path, {k: v for n, layer in layers.items() for k, v in as_arrays(n, unpack(layer.planes)).items()})
        with np.load(path) as stored:
            return from_arrays({name: stored[name] for name in stored.files})

    def trainable(self, flags: str | None, plans, *, model=None, **more):
        """The float model, trainable, from the codes the flags make (None: a quick start), on the device."""
        start = None if flags is None else self.start(flags)
        made = make_trainable(model or self.load()[0], plans, **{"start": start, "freedom": FREEDOM, **more})
        return made.to(self.device)

    def measure(self, model, presets: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Per preset: nll, kl (to the float model) and wrong, means over tokens; exact, the share of rows without a
        wrong token; rows: which rows those are (hex), or the nats of every row where replies have no right answer.
        """
        found = {}
        size = 32 if self.device.type == "cpu" else 256
        for name in presets:
            rows = rows_of(model, self.held_out, name, size=size, source=self.teacher)
            total, right = float(rows["tokens"].sum()), rows["wrong"] == 0
            found[name] = {key: float(rows[key].sum()) / total for key in ("nll", "kl", "wrong")}
            found[name]["exact"] = float(right.double().mean())
            found[name]["rows"] = (
                np.packbits(right.numpy()).tobytes().hex()
                if self.chats is None
                else [round(float(x), 3) for x in rows["nll"]]
            )
        return found


def read_chats(path: Path) -> list[list[dict[str, str]]]:
    """Conversations of a text in tinytalk's form: turns `User: ...` and `Bot: ...<|endoftext|>`, blank lines between
    conversations; other documents, such as stories, are left out, and conversations that are there twice.
    """
    found: dict[str, list[dict[str, str]]] = {}
    for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
        turns = re.findall(r"User: (.*?)\nBot: (.*?)<\|endoftext\|>", block, flags=re.S)
        if block.lstrip().startswith("User:") and turns:
            roles = ("user", "assistant")
            found[block.strip()] = [
                {"role": role, "content": text.strip()}
                for turn in turns
                for role, text in zip(roles, turn, strict=True)
            ]
    return list(found.values())


def kept_rows(path: Path, draw: Callable[[], list[Lesson]]) -> Lessons:
    """Rows of tokens from a file, drawn and kept there at the first call."""
    if not path.is_file():
        rows = draw()
        flat = np.concatenate([np.array(row.ids) * 2 + np.array(row.learn) for row in rows])
        keep(path, {"flat": flat.astype(np.uint32), "lengths": np.array([len(row.ids) for row in rows])})
    with np.load(path) as stored:
        parts = np.split(stored["flat"], np.cumsum(stored["lengths"])[:-1])
    return Lessons([Lesson((p >> 1).tolist(), (p & 1).astype(bool).tolist()) for p in parts], 0, path.stem)


def keep(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays where no other process sees half of them."""
    with atomic_path(path) as staged, Path(staged).open("wb") as file:
        np.savez_compressed(file, **arrays)


def as_arrays(name: str, q: QWeight) -> dict[str, np.ndarray]:
    """A stored weight as plain arrays."""
    parts: dict[str, Any] = {"codes": q.codes_OI, "scale": q.scale_OG, "zero": q.zero, "column": q.column_scale_I}
    parts |= {f"ratio {width}": ratio for width, ratio in q.ratios.items()}
    arrays = {f"{name}|{key}": value.numpy() for key, value in parts.items() if value is not None}
    return arrays | {f"{name}|sizes": np.array([q.bits, q.group_size])}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, QWeight]:
    """The inverse of `as_arrays`, for all layers."""
    found = {}
    for name in dict.fromkeys(key.partition("|")[0] for key in arrays):
        own = {key.partition("|")[2]: torch.from_numpy(v) for key, v in arrays.items() if key.startswith(name + "|")}
        bits, group_size = own["sizes"].tolist()
        ratios = {int(key.split()[1]): value for key, value in own.items() if key.startswith("ratio ")}
        found[name] = QWeight(own["codes"], own["scale"], own["zero"], bits, group_size, ratios, own.get("column"))
    return found


@contextmanager
def clocks(device: torch.device):
    """Seconds of the body: `cpu` of this process, `wall` by the clock, both after the device has finished."""
    found: dict[str, float] = {}
    cpu, wall = time.process_time(), time.perf_counter()
    yield found
    if device.type == "cuda":
        torch.cuda.synchronize()
    found |= {"cpu": round(time.process_time() - cpu, 3), "wall": round(time.perf_counter() - wall, 3)}


def fit(
    bench: Bench, model, objective, presets, *, seed: int, steps: int, rate: float = RATE, batch: int = BATCH,
    schedule=every, balance: str = "sum", lessons: Lessons | None = None,
) -> dict[str, float]:  # fmt: skip
    """Train without probes; the seconds it took, reading the rows not counted."""
    course = Course(
        steps=steps, batch=batch, learning_rate=rate, probes=0, seed=seed, balance=Balance(balance)  # type: ignore[arg-type]
    )  # fmt: skip
    rows = lessons or bench.lessons(seed)
    out = Path(tempfile.mkdtemp())
    try:
        with clocks(bench.device) as spent:
            run(model, rows, objective, presets, out=out, course=course, schedule=schedule)
    finally:
        shutil.rmtree(out)
    return spent


def objective_of(method: str, bench: Bench, labels: float = 0.0, **more: Any) -> Cascade:
    """The objective of an arm; joint has nothing but the data, the others the float model as a model of its own."""
    return Cascade(method, data=1.0 if method == "joint" else labels, source=bench.teacher, **more)  # type: ignore[arg-type]
