"""What polybit reads from files, each as seeds to be changed and the function a verb reads them with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

from tests.fuzz.mutate import HTML, changed_bytes, changed_document, changed_text

Case = Callable[[Random, Path], Callable[[], None]]  # writes what is read into a folder, gives what reads it


@dataclass(frozen=True)
class Room:
    """Good files to begin with: small checkpoints, an eval and a quantize run, an exported GGUF file, pairs."""

    path: Path

    def json(self, name: str) -> Any:
        return json.loads((self.path / name).read_text())


PLAN = {
    "plan": {
        "default": "w4",
        "layers": {"model.layers.0.mlp.up_proj": "w6", "model.layers.0.mlp.down_proj": "w2a8"},
        "columns": {"model.layers.0.self_attn.q_proj": {"block": 32, "offsets": [0, 1]}},
    },
    "made_for": {"model": "tiny", "weights": 8192},
    "group_size": 32,
}
MIX = {"verb": "mix", "numbers": {"mixture": {"best": {"weights": {"stories.txt": 0.25, "gsm8k.jsonl": 0.75}}}}}
MIX_TEXT = "stories.txt=0.25,gsm8k.jsonl=0.75"
RECIPE = """[quantize]
out = "made"
bits = 3
group-size = 64
method = "rounding"
samples = 8
measure = false
calibration = "embedded"
"""
OPENED_EVERY = 10  # files that passed their checks; opening a model takes much longer than these
FIGURES_EVERY = 500  # pages of this many cases draw their figures; the others draw what matplotlib is given as text


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def plan(room: Room) -> Case:
    from polybit.compress.plan_files import check_document, check_plan, read_plan
    from polybit.hub.load import load_float
    from polybit.nn.convert import targets

    found = targets(load_float(room.path / "float")[0])

    def case(random: Random, folder: Path) -> Callable[[], None]:
        path = written(folder / "plan.json", changed_text(random, random.choice((PLAN, PLAN["plan"]))))

        def read() -> None:
            plan = read_plan(path)
            check_document(path, found, 32)
            check_plan(plan, found, 32)

        return read

    return case


def mix(room: Room) -> Case:
    from polybit.compress.mix_files import read_mix

    def case(random: Random, folder: Path) -> Callable[[], None]:
        if random.random() < 0.3:
            text = changed_bytes(random, MIX_TEXT.encode()).decode("utf-8", "surrogateescape")
            return lambda: shares(read_mix(text))
        path = written(folder / "mix.json", changed_text(random, MIX))
        return lambda: shares(read_mix(str(path)))

    def shares(found: dict[str, float]) -> None:
        assert found and all(0 < share < float("inf") for share in found.values())

    return case


def pairs(room: Room) -> Case:
    from polybit.hub.directory import write_manifest
    from polybit.train.material import largest_token, read_material
    from polybit.train.pairs import SUMMARY, read_pairs, summary

    noted, lines = room.json("pairs/pairs.json"), (room.path / "pairs/shard-00000.jsonl").read_bytes().splitlines()
    scores = (room.path / "pairs/scores-00000.safetensors").read_bytes()
    reference = (room.path / "pairs.reference").read_text()

    def case(random: Random, folder: Path) -> Callable[[], None]:
        which = random.randrange(5)
        (folder / SUMMARY).write_bytes(changed_text(random, noted) if which == 0 else json.dumps(noted).encode())
        rows = list(lines)
        if 1 <= which <= 3:
            at = random.randrange(len(rows))
            rows[at] = changed_text(random, json.loads(rows[at]))
        (folder / "shard-00000.jsonl").write_bytes(b"\n".join(rows) + b"\n")
        (folder / "scores-00000.safetensors").write_bytes(changed_bytes(random, scores) if which == 4 else scores)
        if random.random() < 0.9:  # as a careful forger would
            write_manifest(folder)

        def read() -> None:
            assert isinstance(summary(folder)["precision"], str)
            read_pairs(folder)
            largest_token(read_material(folder, reference=reference, pad_token=0))

        return read

    return case


def report(room: Room) -> Case:
    import polybit.acts.report as act
    from polybit.options.report import ReportOptions
    from polybit.report import plots

    evaluation, made = room.json("eval.json"), room.json("run.json")
    drawn = {name: getattr(plots, name) for name in FIGURES}
    counted = [0]

    def case(random: Random, folder: Path) -> Callable[[], None]:
        counted[0] += 1
        figures = drawn if counted[0] % FIGURES_EVERY == 0 else dict.fromkeys(FIGURES, sketch)
        which = random.randrange(4)
        model = folder / "model"
        model.mkdir()
        data = changed_text(random, evaluation) if which else json.dumps(evaluation).encode()
        (model / "run.json").write_bytes(json.dumps(made).encode() if which else changed_text(random, made))
        path, page = written(folder / "eval.json", data), folder / "page.html"
        page.write_text("an older page")
        before = f"Other={path}" if random.random() < 0.2 else None
        options = ReportOptions(eval=path, before=before, out=page)

        def read() -> None:
            try:
                with patch.multiple(plots, **figures):
                    act.report(str(model), options)
            except BaseException:
                assert page.read_text() == "an older page", "a page was lost"
                raise
            text = page.read_text().lower()
            assert HTML.lower() not in text and "<img src=x" not in text, "HTML of the input is in the page"
            assert text.count("<script") == text.count("</script"), "a script of the input is in the page"

        return read

    return case


FIGURES = ("quality_against_bits", "scores_against_bits", "curves", "histograms", "layer_bytes")


def sketch(*values: Any, **named: Any) -> str:
    """In the place of a figure: what it was given is gone through."""
    return f"<svg>{len(json.dumps([values, named], default=list))}</svg>"


def recipe(room: Room) -> Case:
    from polybit.cli import build_app, take_config

    def case(random: Random, folder: Path) -> Callable[[], None]:
        path = folder / "recipe.toml"
        if random.random() < 0.5:
            path.write_bytes(changed_bytes(random, RECIPE.encode()))
        else:
            rows = [line.split(" = ") for line in RECIPE.splitlines()[1:]]
            for _ in range(random.choice((1, 1, 2, 3))):
                row = random.choice(rows)
                row[random.randrange(2)] = random.choice(TOML)
            path.write_text("[quantize]\n" + "".join(f"{key} = {value}\n" for key, value in rows))

        def read() -> None:
            tokens, config = take_config(["--config", str(path), "quantize", "tinychat"])
            command, bound, *_ = build_app(config).parse_args(tokens, print_error=False, exit_on_error=False)
            assert command.__name__ == "quantize" and bound.arguments

        return read

    return case


TOML = (
    "1",
    "-1",
    "0",
    "99999999999999999999",
    "1e400",
    "nan",
    "inf",
    "true",
    '""',
    '"w4"',
    '"x"',
    "[]",
    "[1, 2]",
    "{}",
    "{ a = 1 }",
    "1979-05-27",
    '"\\u0000"',
    "'''\nlong\n'''",
    "bits",
    "out",
    "widths",
    "unknown",
    "[x]",
    '"' + "y" * 5000 + '"',
)


def router(room: Room) -> Case:
    from polybit.serve.router import ROUTER, checkpoint_digest, read_router

    def case(random: Random, folder: Path) -> Callable[[], None]:
        shutil.copy(room.path / "checkpoint" / "manifest.json", folder)
        seed = router_seed(checkpoint_digest(folder))
        written(folder / ROUTER, changed_text(random, seed))

        def read() -> None:
            found = read_router(folder, ("w8", "w4", "w3"), 6)
            assert found is not None
            found.choose(found.mean_F)

        return read

    return case


def router_seed(checkpoint: str) -> dict[str, Any]:
    from polybit.serve.router import FEATURES, VERSION

    features = len(FEATURES) + 2
    return {
        "version": VERSION,
        "checkpoint": checkpoint,
        "widths": ["w8", "w4", "w3"],
        "bits": [8.0, 4.0, 3.0],
        "mean": [0.1] * features,
        "spread": [1.0] * features,
        "coefficients": [[0.01] * (features + 1)] * 3,
        "basis": [[0.5, 0.5]] * 6,
        "price": 0.001,
        "budget": 4.0,
    }


def checkpoint(room: Room) -> Case:
    from polybit.hub.checkpoint import validate
    from polybit.hub.directory import write_manifest
    from polybit.hub.load import load_quantized

    good = room.path / "checkpoint"
    names = ("config.json", "config.json", "manifest.json", "polybit.safetensors", "polybit.safetensors")
    loaded = [0]

    def case(random: Random, folder: Path) -> Callable[[], None]:
        for path in good.iterdir():
            shutil.copy(path, folder)
        name = random.choice(names)
        data = (folder / name).read_bytes()
        if name.endswith(".json"):
            (folder / name).write_bytes(changed_text(random, json.loads(data)))
        else:
            (folder / name).write_bytes(changed_weights(random, data))
        if name != "manifest.json" and random.random() < 0.8:  # as a careful forger would
            write_manifest(folder)

        def read() -> None:
            validate(folder)
            loaded[0] += 1
            if loaded[0] % OPENED_EVERY == 0:
                load_quantized(folder)

        return read

    return case


def changed_weights(random: Random, data: bytes) -> bytes:
    """A safetensors file with another header, or other bytes."""
    length = int.from_bytes(data[:8], "little")
    if random.random() < 0.5:
        return changed_bytes(random, data)
    header = json.dumps(changed_document(random, json.loads(data[8 : 8 + length]), random.choice((1, 1, 2)))).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def gguf(room: Room) -> Case:
    import torch

    from polybit.hub.gguf_file import open_gguf
    from polybit.hub.gguf_header import check_gguf

    good = (room.path / "gguf" / "model.gguf").read_bytes()
    head = good.index(b"\0tokenizer.ggml.merges")  # words and weights are most of a file
    beginning = len(good) // 20
    passed = [0]

    def case(random: Random, folder: Path) -> Callable[[], None]:
        cut = random.choice((head, head, 2 * head, beginning, len(good)))
        path = written(folder / "model.gguf", changed_bytes(random, good[:cut]) + good[cut:])

        def read() -> None:
            check_gguf(path)
            passed[0] += 1
            if passed[0] % OPENED_EVERY == 0:
                open_gguf(str(path), dtype=torch.float32)

        return read

    return case


READERS: dict[str, Callable[[Room], Case]] = {
    "checkpoint": checkpoint,
    "plan": plan,
    "mix": mix,
    "pairs": pairs,
    "report": report,
    "recipe": recipe,
    "router": router,
    "gguf": gguf,
}
