"""Every verb that writes as one small run, and what of its output must be the same after a killed run as without."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM

from polybit.cli import main
from polybit.export.table import EXPORTERS
from polybit.hub.directory import MANIFEST, check_manifest
from tests.export.checkpoints import checkpoint

SMALL = ["--steps", "3", "--batch", "2"]
FEW = ["--samples", "4", "--window", "32"]
TEXT = ["--calibration", "embedded"]
LITTLE = ["--windows", "2", "--window", "32"]
CLOCK = re.compile(r".*seconds.*|.*memory_bytes|rss_.*|started")  # keys of what differs each time
TALK = ["How are you?", "What is 3 plus 4?", "Tell me a story.", "Who are you?", "Hi!"]
GRID = """
seeds = 1
[quantize]
method = ["rtn", "gptq"]
bits = 4
effort = "fast"
samples = 4
window = 32
calibration = "embedded"
[eval]
text = "embedded-test"
windows = 2
window = 32
answers = 0
"""


class Room:
    """Good inputs of the verbs in one folder, each made when it is first asked for."""

    def __init__(self, folder: Path, llama: Path) -> None:
        self.folder, self.llama = folder, folder / "llama"
        self.judge = ""  # the address of an endpoint
        shutil.copytree(llama, self.llama)

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """A file or folder of the room."""
        path = self.folder / name
        if not path.exists():
            make(path)
        return path

    @property
    def fixed(self) -> Path:
        """A checkpoint of whole zero points."""
        return self.made("fixed", lambda out: checkpoint(out, bits=4, zero="level", nested=False))

    @property
    def long(self) -> Path:
        """One block of the tiny model, that reads longer texts."""

        def make(out: Path) -> None:
            model = LlamaForCausalLM.from_pretrained(self.llama)
            model.model.layers = model.model.layers[:1]
            model.config.num_hidden_layers, model.config.max_position_embeddings = 1, 512
            shutil.copytree(self.llama, out)
            model.save_pretrained(out)

        return self.made("long", make)

    @property
    def small(self) -> Path:
        """The tiny model at four bits."""
        words = ["quantize", str(self.llama), "--method", "rtn", "--bits", "4", *FEW, *TEXT, "--no-measure", "--out"]
        return self.made("small", lambda out: main([*words, str(out)]))

    @property
    def nested(self) -> Path:
        """The tiny model at several widths."""
        words = ["quantize", str(self.llama), "--widths", "8,4,2", "--effort", "fast", *FEW, *TEXT, "--no-measure"]
        return self.made("nested", lambda out: main([*words, "--out", str(out)]))

    @property
    def prompts(self) -> Path:
        """A few prompts."""
        return self.made("prompts.txt", lambda path: path.write_text("\n".join(TALK) + "\n"))

    @property
    def many(self) -> Path:
        """As many prompts as a router needs."""
        lines = [f"question {i} about {'x' * (i % 7)} {i * i}" for i in range(24)]
        return self.made("many.txt", lambda path: path.write_text("\n".join(lines) + "\n"))

    @property
    def talk(self) -> Path:
        """Text to calibrate on."""
        lines = [f"Number {i} is {i * i} in squares, {i + i} in pairs." for i in range(99)]
        return self.made("talk.txt", lambda path: path.write_text("\n".join(lines)))

    @property
    def answers(self) -> Path:
        """Pairs of answers."""
        return self.made("answers", lambda out: main([*VERBS["pairs"].words(self, out), "--out", str(out)]))

    @property
    def measured(self) -> Path:
        """The run of an evaluation."""
        words = ["eval", str(self.small), "--text", "embedded-test", *LITTLE, "--answers", "2", "--max-tokens", "4"]
        return self.made("eval.json", lambda path: main([*words, "--json", str(path)]))

    @property
    def grid(self) -> Path:
        """Combinations for a sweep."""
        return self.made("grid.toml", lambda path: path.write_text(GRID))

    @property
    def questions(self) -> Path:
        """Questions for a judge, more than a part of answers has."""
        rows = [{"question_id": n, "category": "math", "turns": [f"Say {n}.", "Again?"]} for n in range(18)]
        return self.made("questions.jsonl", lambda path: path.write_text("\n".join(map(json.dumps, rows))))


@dataclass(frozen=True, slots=True)
class Verb:
    """A run of a verb.

    told: room and place (an empty folder) -> its words, with paths of what it writes · flag: what names its output,
    `out` and an ending in the place · anew: refuses to write where something is · over: writes over it anew; others
    find it finished · also: names of what it writes beside · timed: its numbers are the clock's · begins: puts into
    the place what must be there before
    """

    told: Callable[[Room, Path], Sequence[object]]
    flag: str = "--out"
    ending: str = ""
    anew: bool = False
    over: bool = False
    also: tuple[str, ...] = ()
    timed: bool = False
    begins: Callable[[Room, Path], object] = field(default=lambda room, place: None)

    def words(self, room: Room, out: Path) -> list[str]:
        """The command line without its output."""
        return [str(word) for word in self.told(room, out.parent)]

    def out(self, place: Path) -> Path:
        """Where the output goes."""
        return place / f"out{self.ending}"

    def command(self, room: Room, place: Path) -> list[str]:
        """The whole command line."""
        out = self.out(place)
        return [*self.words(room, out), *([self.flag, str(out)] if self.flag else [])]


def exporting(to: str) -> Verb:
    """An export in one format."""
    return Verb(lambda room, _: ["export", room.fixed, "--to", to, "--windows", "0", "--overwrite"], over=True)


def training(*more: object) -> Verb:
    """A training run of two presets."""
    words = ["--presets", "A=w8a8,B=w4a4", *SMALL, *more]
    return Verb(lambda room, _: ["train", room.llama, "--data", room.talk, *words], anew=True)


def quantizing(*more: object) -> Verb:
    """A quantization at several widths."""
    return Verb(lambda room, _: ["quantize", room.llama, *TEXT, *FEW, *more], anew=True)


def record(*words: object, model: str = "nested") -> Verb:
    """A verb that writes nothing but the record of its run."""
    return Verb(lambda room, _: [words[0], getattr(room, model), *words[1:]], "--json", ".json", over=True, timed=True)


def studying(question: str, *more: object) -> Verb:
    """A study of the tiny model."""
    return Verb(lambda room, _: ["study", room.long, "--question", question, "--batch", "2", *more])


EXAM = ["--test-prompts", "4", "--max-tokens", "4", "--text", "embedded-test", "--text-windows", "1", *FEW, *TEXT]
VERBS: dict[str, Verb] = {
    **{f"export {to}": exporting(to) for to in EXPORTERS},
    "quantize": quantizing("--widths", "8,4,2"),
    "quantize streamed": quantizing("--widths", "8,4,2", "--memory", "0.0001", "--no-measure"),
    "quantize learned": quantizing("--method", "rounding", "--bits", "3", "--no-measure"),
    "allocate": Verb(
        lambda room, place: ["allocate", room.llama, "--bits", "4", "--general", "embedded", "--tasks", "arithmetic",
                             *FEW, "--items", "2", "--calibration-samples", "4", "--cache", place / "cache",
                             "--report", place / "page.html"],
        ending=".json", anew=True, also=("cache", "page.html"),
    ),
    "mix": Verb(
        lambda room, _: ["mix", room.llama, "--general", "embedded", "--tasks", room.talk, *FEW, "--verify", "--method",
                         "rtn", "--seeds", "1"],
        "--json", ".json", anew=True,
    ),
    "columns": Verb(
        lambda room, place: ["columns", room.llama, "--bits", "3.5", "--block", "32", "--group-size", "32", *FEW, *TEXT,
                             "--sort", place / "sorted"],
        ending=".json", anew=True, also=("sorted",),
    ),
    "route": Verb(
        lambda room, place: ["route", place / "nested", "--reference", room.llama, "--prompts", room.many, "--budget",
                             "4", "--max-tokens", "2", "--page", place / "page.html"],
        "--json", ".json", over=True, also=("page.html", "nested/router.json"),
        begins=lambda room, place: shutil.copytree(room.nested, place / "nested"),
    ),
    "eval": Verb(
        lambda room, _: ["eval", room.small, "--text", "embedded-test", *LITTLE, "--answers", "2", "--max-tokens", "4"],
        "--json", ".json", anew=True,
    ),
    "judge": Verb(
        lambda room, _: ["judge", room.small, "--questions", room.questions, "--max-tokens", "2", "--mode",
                         "pair,single,fidelity", "--endpoint", room.judge, "--judge", "j"],
    ),
    "report": Verb(lambda room, _: ["report", room.small, "--eval", room.measured], ending=".html", over=True),
    "pairs": Verb(
        lambda room, _: ["pairs", room.llama, "--prompts", room.prompts, "--precision", "w2", "--max-tokens", "6"],
        anew=True,
    ),
    "align": Verb(
        lambda room, _: ["align", room.llama, "--pairs", room.answers, "--precision", "w2", *SMALL], anew=True
    ),
    "train": training(),
    "train lora": training("--adapter", "lora", "--rank", "2"),
    "train nested": training("--adapter", "nested"),
    "train independent": training("--method", "independent"),
    "sweep": Verb(lambda room, _: ["sweep", room.llama, "--grid", room.grid]),
    "frontier": Verb(
        lambda room, _: ["frontier", room.nested, "--presets", "w8,w2", "--points", "2", "--evaluations", "2", *LITTLE],
        over=True,
    ),
    "attack": Verb(
        lambda room, place: ["attack", room.nested, "--items", "2", "--tokens", "2", "--steps", "1", "--tries", "2",
                             "--precision", "w8,w2", "--max-tokens", "4", "--report", place / "page.html"],
        "--json", ".json", also=("page.html",),
    ),
    "study": studying(
        "switchable", "--presets", "A=w8a8,B=w3a4", "--arms", "cdt", "--steps", "2", "--rows", "8", "--length", "96",
        "--group-size", "16", "--items", "1", "--attack-items", "1", "--evaluations", "0",
    ),
    "study conversation": studying(
        "conversation", "--train-prompts", "4", "--steps", "2", "--bits", "2", "--aligned-bits", "2", "--quantizers",
        "rtn", "--starts", "rtn", "--objectives", "kd", *EXAM,
    ),
    "generate": record("generate", "--prompt", "Hi", "--max-tokens", "2"),
    "chat": record("chat", "--line", "Hi", "--max-tokens", "2"),
    "plan": record("plan", model="llama"),
    "cost": record("cost", "--context", "8", "--steps", "1", "--rounds", "1"),
    "doctor": Verb(lambda room, _: ["doctor"], "--json", ".json", over=True, timed=True),
    "bench": Verb(
        lambda room, place: ["bench", "linear", "--shape", "64x64", "--rounds", "1", "--no-peers", "--widths", "4",
                             "--chart", place / "chart.svg"],
        "--json", ".json", over=True, also=("chart.svg", "machine"), timed=True,
    ),
}  # fmt: skip


def content(path: Path, *, timed: bool = False) -> Any:
    """What must be the same: sizes and digests of an artefact, numbers but those of the clock; of pages, which are
    made of the same numbers, that they are whole.

    Every file that is there is read as what its name says, so that half a file is no content.
    """
    if path.is_dir() and (path / MANIFEST).is_file():
        check_manifest(path)
        files = json.loads((path / MANIFEST).read_text())["files"]
        named = {name: entry for name, entry in files.items() if not name.endswith("history.json")}
        more = [path / name for name in ("router.json", "README.md") if (path / name).is_file()]
        return named | {each.name: content(each) for each in more}
    if path.is_dir():
        return {
            each.name: content(each, timed=timed)
            for each in sorted(path.iterdir())
            if not each.name.startswith(".") and not each.name.endswith((".partial", ".finished", "-journal"))
        }
    if path.suffix == ".sqlite":
        with closing(sqlite3.connect(path)) as db:
            return sorted(db.execute("SELECT key, text FROM replies").fetchall())
    if path.suffix == ".safetensors":
        return path.stat().st_size
    text = path.read_text()
    if path.suffix == ".json":
        found = json.loads(text)
        found = timeless(found.get("numbers", found) if isinstance(found, dict) else found)
        return json.loads(json.dumps(found), parse_float=lambda _: 0, parse_int=lambda _: 0) if timed else found
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    ends = {".html": "</html>", ".svg": "</svg>", ".md": ""}
    assert text.rstrip().endswith(ends[path.suffix]), f"{path} is cut short"
    return path.suffix


def timeless(value: Any) -> Any:
    """JSON without what a clock or the memory said."""
    if isinstance(value, dict):
        return {key: timeless(each) for key, each in value.items() if not CLOCK.fullmatch(key)}
    return [timeless(each) for each in value] if isinstance(value, list) else value


def listing(place: Path) -> set[str]:
    """Everything that lies in a folder, hidden files too."""
    return {str(path.relative_to(place)) for path in place.rglob("*")}
