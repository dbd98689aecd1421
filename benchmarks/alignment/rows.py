"""Rows of the tables: one objective, one start, one width, one seed; or one run over several widths."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench import Bench
from features import Features
from variants import Variant

from polybit.compress.stats import collect
from polybit.core.plan import Plan
from polybit.nn.convert import targets
from polybit.train import align, chain, latent
from polybit.train.distill import Distillation
from polybit.train.fit import Course, Outcome
from polybit.train.latent import Freedom, make_trainable
from polybit.train.preference import Preference, Stages
from polybit.train.schedules import every
from polybit.train.table import ANSWER_OBJECTIVES, STATIC_RATE

RATES = {name: part.rate for name, part in ANSWER_OBJECTIVES.items()} | {"qdpo-static": STATIC_RATE}
RATES["qdpo-refreshed"] = RATES["qdpo"]
WORDS = ("focus", "kind", "answers", "turns", "scales", "chained", "pace", "judged")


def read(spec: str) -> tuple[str, float, dict[str, Any]]:
    """`name[@rate][:key=value...]` -> name, learning rate, knobs."""
    head, *rest = spec.split(":")
    name, _, rate = head.partition("@")
    pairs = [item.split("=") for item in rest]
    return name, float(rate or RATES.get(name, 3e-4)), {k: v if k in WORDS else float(v) for k, v in pairs}


def objective(name: str, knobs: dict[str, Any], steps: int) -> tuple[Any, int]:
    """(objective, steps between renewals of the model's own answers) of a row."""
    distil = {k: v for k, v in knobs.items() if k in Variant.__dataclass_fields__}
    kd = Variant(**distil) if distil.keys() - Distillation.__dataclass_fields__.keys() else Distillation(**distil)
    renewed = int(knobs.get("refresh", max(1, steps // 10)))
    beta, gamma = knobs.get("beta", 0.1), knobs.get("gamma", 10.0)
    both = Preference(beta, gamma=gamma, distill=Distillation())
    single = Preference(
        beta, nll=knobs.get("nll", 0.0), mean=bool(knobs.get("mean")), anchor=knobs.get("anchor", 0.0),
        gamma=knobs.get("kd", 0.0), distill=Distillation() if knobs.get("kd") else None,
    )  # fmt: skip
    half = steps // 2
    made: dict[str, Callable[[], tuple[Any, int]]] = {
        "kd": lambda: (kd, renewed if knobs.get("both") else 0),
        "kd-own": lambda: (replace(kd, answers="own", kind=knobs.get("kind", "reverse")), renewed),
        "features": lambda: (Features(knobs["weight"], kd), 0),
        "qdpo-static": lambda: (single, 0),
        "qdpo-refreshed": lambda: (single, renewed),
        "qdpo-nll": lambda: (Preference(beta, nll=1.0), renewed),
        "ipo": lambda: (Preference(beta, "ipo"), renewed),
        "qdpo+kd": lambda: (both, renewed),
        "kd-then-qdpo": lambda: (Stages([(Distillation(), half), (both, steps - half)]), renewed),
    }
    if name not in made:
        raise SystemExit(f"row {name} is not known: choose one of start, {', '.join(made)}")
    return made[name]()


def run(bench: Bench, spec: str, bits: int, method: str, seed: int, course: Course) -> dict[str, Any]:
    """One row: train from a start, keep the best moment of its own probe, measure on the held-out prompts."""
    name, rate, knobs = read(spec)
    preset = f"w{bits}"
    model = bench.trainable(method, bits, knobs.get("margin"), knobs.get("scales", ""))
    record: dict[str, Any] = {"row": spec, "bits": bits, "start": method, "seed": seed, "seconds": 0.0}
    if name != "start":
        chosen, renewed = objective(name, knobs, course.steps)
        if isinstance(chosen, Features):
            chosen.listen(model)
        material, probe = bench.material(method, bits)
        course = replace(course, learning_rate=rate, seed=seed, back=knobs.get("back"))
        outcome, record["seconds"], record["cpu"] = train(
            bench, model, (material, probe), chosen, (preset,), course, renewed=renewed
        )
        record |= notes(outcome, preset)
    return record | {"measured": bench.measure(model, preset)}


def elastic(bench: Bench, spec: str, widths: tuple[int, ...], seed: int, course: Course) -> list[dict[str, Any]]:
    """One run over several widths of one nested file, `elastic@3e-4:turns=w4/w3/w2:chained=4/3/2`, or a separate run,
    with turns of one width: KD from the same codes, a record per width.

    turns: the width of each step, over and over · chained, margin, scales: `Freedom` · steps: of the whole run.
    """
    _, rate, knobs = read(spec)
    presets = {f"w{b}": Plan.uniform(b) for b in widths}
    freedom = Freedom(
        codes="shared", scales=knobs.get("scales", "frozen"), margin=knobs.get("margin", 0.5),
        chained=tuple(int(b) for b in str(knobs.get("chained", "")).split("/") if b),
    )  # fmt: skip
    if "pace" in knobs:
        paces = zip((2, 3, 4), map(float, knobs["pace"].split("/")), strict=True)
        chain.PACE |= dict(paces)
    chain.FOLLOW = knobs.get("follow", chain.FOLLOW)
    start = bench.start("nested", 8, widths)
    model = make_trainable(
        copy.deepcopy(bench.model), presets, start=start, group_size=bench.setting.group_size, zero="group",
        freedom=freedom,
    )  # fmt: skip
    turns = list(turns_of(knobs.get("turns", "/".join(presets))))
    record: dict[str, Any] = {"row": spec, "widths": list(widths), "start": "nested", "seed": seed}
    seconds, outcome = 0.0, None
    if turns != ["none"]:
        course = replace(course, learning_rate=rate, seed=seed, steps=int(knobs.get("steps", course.steps)))
        material, probe = bench.material("rtn", min(widths))
        judged = tuple(knobs["judged"].split("/")) if "judged" in knobs else tuple(presets)
        outcome, seconds, _ = train(
            bench, model, (material, probe), Distillation(), judged, course,
            schedule=lambda step, _: (turns[step % len(turns)],),
        )  # fmt: skip
        if "settle" in knobs:
            settle(bench, model)
    found = []
    for name in presets:
        more = notes(outcome, name) if outcome and name in outcome.start else {}
        more |= {"bits": int(name[1:]), "seconds": seconds, "measured": bench.measure(model, name)}
        found.append(record | more)
    return found


def settle(bench: Bench, model) -> None:
    """Bits below the trained ones chosen again, on 64 windows of float answers."""
    rows = [[*p, *a] for p, a in zip(bench.train, bench.answers, strict=False)]
    ids_NT = torch.tensor([token for row in rows for token in row])[: 64 * 128].view(-1, 128)
    batches = list(ids_NT.to(bench.setting.device).split(8))
    latent.settle(model, collect(bench.model, batches, targets(bench.model)))


def turns_of(text: str) -> Iterator[str]:
    """The presets of a round of steps, in order: "w4/w2x3" is w4, w2, w2, w2."""
    for part in text.split("/"):
        name, _, times = part.partition("x")
        yield from [name] * int(times or 1)


def train(bench: Bench, model, halves, chosen, presets, course: Course, *, renewed: int = 0, schedule=every):
    """(outcome, wall seconds, CPU seconds) of one run."""
    with tempfile.TemporaryDirectory() as out:
        began, spent = time.perf_counter(), time.process_time()
        outcome = align.run(
            model, halves, chosen, presets, out=Path(out), course=course, schedule=schedule,
            refresh=align.Refresh(bench.tokenizer, renewed, bench.setting.max_tokens),
        )  # fmt: skip
        return outcome, time.perf_counter() - began, time.process_time() - spent


def notes(outcome: Outcome, preset: str) -> dict[str, Any]:
    """What the probes of a run said."""
    return {
        "kept": outcome.picker.best["step"],
        "reason": outcome.picker.reason(),
        "last": outcome.picker.history[-1]["presets"],
        "probe_start": outcome.start[preset],
        "probe_best": outcome.best[preset],
    }
