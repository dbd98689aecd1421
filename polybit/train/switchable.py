"""One run of switchable training: a trainable model, rows of tokens, an objective and a schedule over presets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from polybit.data.lessons import Lessons
from polybit.data.lessons import batch as as_batch
from polybit.nn.switch import at
from polybit.train.cascade import FLOAT, answer_part
from polybit.train.fit import Course, Outcome, Teaching, fit
from polybit.train.forward import logits_of
from polybit.train.picker import Probed
from polybit.train.schedules import every
from polybit.train.table import Schedule

SORTED = 16  # batches whose rows are sorted by length together, so that little is padding


def run(
    model: nn.Module,
    lessons: Lessons,
    objective: Any,
    presets: Sequence[str],
    *,
    out: Path,
    course: Course,
    schedule: Schedule = every,
    held_out: Lessons | None = None,
) -> Outcome:
    """Train `model` (from make_trainable) on the device it is on and leave its best weights in it; an interrupted run
    in `out` goes on.

    presets: most precise first · held_out: rows no step reads; the moment with the least held-out loss is kept, unless
    a preset is then worse than at its start.
    """
    rows = lessons.rows
    teaching = Teaching(
        order=grouped_order([len(row.ids) for row in rows], course.steps, course.batch, seed=course.seed),
        gather=lambda chosen, step: as_batch([rows[row] for row in chosen], 0),
        objective=objective,
        presets=presets,
        schedule=schedule,
        probe=None if held_out is None else LessonProbe(held_out, tuple(presets)),
    )
    return fit(model, teaching, course, out=out)


def grouped_order(lengths: Sequence[int], steps: int, size: int, *, seed: int) -> list[int]:
    """Row numbers of `steps` batches of `size`: shuffled passes, rows of like length together, batches shuffled."""
    rng = Random(seed)
    found: list[int] = []
    while len(found) < steps * size:
        pool = list(range(len(lengths)))
        rng.shuffle(pool)
        pool += pool[: -len(pool) % size]  # the last batch is filled up from the front
        batches = []
        for start in range(0, len(pool), size * SORTED):
            near = sorted(pool[start : start + size * SORTED], key=lambda row: lengths[row])
            batches += [near[i : i + size] for i in range(0, len(near), size)]
        rng.shuffle(batches)
        found += [row for batch in batches for row in batch]
    return found[: steps * size]


@dataclass(frozen=True)
class LessonProbe:
    """Held-out rows read at every preset, teacher-forced on the learnt tokens."""

    held_out: Lessons
    presets: tuple[str, ...]

    def __call__(self, model: nn.Module) -> Probed:
        """nll: nats per token · wrong: share of tokens that are not the likeliest · kl: KL(float || preset), nats."""
        return {name: means(rows_of(model, self.held_out, name)) for name in self.presets}


@torch.no_grad()
def rows_of(
    model: nn.Module, lessons: Lessons, preset: str, *, size: int = 16, source: nn.Module | None = None
) -> dict[str, Tensor]:
    """Sums over the learnt tokens of every row: nll, wrong, kl to the float model, and tokens, float64 [rows].

    source: the float model as a model of its own; without it the float preset of `model` stands for it, which moves
    when norms or embeddings are trained.
    """
    device = next(model.parameters()).device
    names = ("nll", "wrong", "kl", "tokens")
    found = {name: torch.zeros(len(lessons.rows), dtype=torch.float64) for name in names}
    order = sorted(range(len(lessons.rows)), key=lambda row: len(lessons.rows[row].ids))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        batch = {k: v.to(device) for k, v in as_batch([lessons.rows[row] for row in chosen], 0).items()}
        part, target_N = answer_part(batch)
        line_N = part["keep_BT"].nonzero()[:, 0].cpu()
        if source is not None:
            float_NV = log_softmax(logits_of(source, part).float(), -1)
        else:
            with at(model, FLOAT):
                float_NV = log_softmax(logits_of(model, part).float(), -1)
        with at(model, preset):
            logits_NV = logits_of(model, part).float()
        given_NV = log_softmax(logits_NV, -1)
        values = {
            "nll": cross_entropy(logits_NV, target_N, reduction="none"),
            "wrong": logits_NV.argmax(-1) != target_N,
            "kl": (float_NV.exp() * (float_NV - given_NV)).sum(-1),
            "tokens": torch.ones_like(target_N),
        }
        sums_4N = torch.stack([values[name].double() for name in names]).cpu()  # one copy: a GPU is waited for once
        for name, value_N in zip(names, sums_4N, strict=True):
            found[name].index_add_(0, torch.tensor(chosen)[line_N], value_N)
    return found


def means(rows: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over tokens of what `rows_of` sums."""
    total = float(rows["tokens"].sum())
    return {name: float(value.sum()) / total for name, value in rows.items() if name != "tokens"}
