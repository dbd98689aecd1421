"""EM and F1 of everything a study compares, pooled over seeds, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polybit.acts.table import BASELINE
from polybit.core.runtime import write_json
from polybit.data.squad import Asked, SquadFile, choose, open_squad
from polybit.evals.scoring import bootstrap
from polybit.evals.squad import generative
from polybit.evals.squad import run as ask
from polybit.hub.files import read_json
from polybit.hub.lm import LocalLM
from polybit.hub.models import open_model
from polybit.options.checks import seeds_of
from polybit.options.study import StudyOptions

METRICS = ("em", "f1")


@dataclass(frozen=True, slots=True)
class StudyRow:
    """A model at a precision (None = as it is) under the label of its row; several seeds share one."""

    label: str
    path: str
    precision: str | None


def score_all(models: Sequence[StudyRow], options: StudyOptions, presets: Sequence[str]) -> dict[str, Any]:
    """label -> EM and F1 with intervals, and how much F1 differs from the baseline and from the start."""
    folder = options.out / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    file = open_squad(options.squad, folder, count=options.items)
    asked = choose(file.questions(), options.items)
    found: dict[str, dict[str, list[float]]] = {}
    for one in models:
        rows = scores_of(one, asked, file, folder, options)
        for metric in METRICS:
            found.setdefault(one.label, {}).setdefault(metric, []).extend(rows[metric])
    table = {
        label: {metric: bootstrap(values).to_json() for metric, values in row.items()} | differences(label, found)
        for label, row in found.items()
    }
    return {"questions": len(asked), "seeds": len(seeds_of(options.seeds)), "rows": table}


def differences(label: str, found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """F1 of one row minus that of the baseline's and of the start's at the same preset, paired by question."""
    arm, _, preset = label.rpartition(" ")
    own, row = found[label]["f1"], {}
    for other in (BASELINE, "quantized"):
        base = found.get(f"{other} {preset}", {}).get("f1")
        if not arm or arm == other or base is None:
            continue
        times = len(own) // len(base) or 1  # the start was scored once, the arms with every seed
        if len(base) * times == len(own):
            row[f"f1 over {other}"] = bootstrap(own, paired_with=base * times).to_json()
    return row


def scores_of(
    one: StudyRow, asked: Sequence[Asked], file: SquadFile, folder: Path, options: StudyOptions
) -> dict[str, list[float]]:
    """Scores per question of one model at one precision; predictions are frozen before an answer is read."""
    name = f"{Path(one.path).parent.name}-{Path(one.path).name}-{one.label}".replace(" ", "-")
    stored = folder / f"{name}.scores.json"
    if not stored.is_file():
        model, tokenizer = open_model(one.path, trust_remote_code=options.trust_remote_code)
        lm = LocalLM(model, tokenizer)
        with lm.at(one.precision):
            scores = ask(generative(lm), asked, file, folder / f"{name}.json")
        write_json(stored, {metric: [float(value) for value in scores[metric]] for metric in METRICS})
    found: dict[str, list[float]] = read_json(stored)
    return found
