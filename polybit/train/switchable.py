"""One run of switchable training: a trainable model, rows of tokens, an objective and a schedule over presets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from polybit.core.runtime import PolybitError
from polybit.data.lessons import Lessons
from polybit.data.lessons import batch as as_batch
from polybit.train.balance import Balance
from polybit.train.cascade import FLOAT, answer_part
from polybit.train.forward import logits_of
from polybit.train.latent import at, use
from polybit.train.picker import Picker, Probed
from polybit.train.schedules import Schedule, every
from polybit.train.trainer import PrecisionTrainer, settings

SORTED = 16  # batches whose rows are sorted by length together, so that little is padding
JUDGED = ("nll", "wrong")


@dataclass(frozen=True)
class Course:
    """How a run goes.

    batch: rows of a step · probes: how often held-out rows are read (0 = never: the last weights are kept) · slack: how
    much worse than its start a preset's held-out loss may become before a moment is refused, as a share · balance: how
    the gradients of the presets are put together.
    """

    steps: int = 200
    batch: int = 8
    learning_rate: float = 3e-4
    probes: int = 5
    slack: float = 0.02
    seed: int = 0
    balance: Balance = field(default_factory=Balance)
    further: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("batch", self.batch)):
            if value < 1:
                raise PolybitError(f"{name} {value} is not possible: give 1 or more")
        if not 0 < self.learning_rate < 1:
            raise PolybitError(f"learning rate {self.learning_rate} is not possible: give a number such as 3e-4")


@dataclass(frozen=True)
class Outcome:
    """What a run did: its log, the probes (None without), seconds of wall time."""

    log: list[dict[str, Any]]
    picker: Picker | None
    seconds: float


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
    torch.manual_seed(course.seed)
    rows = lessons.rows
    order = grouped_order([len(row.ids) for row in rows], course.steps, course.batch, seed=course.seed)
    probed = held_out is not None and course.probes > 0
    probe_every = max(1, course.steps // course.probes) if probed else 0
    arguments = settings(
        out,
        steps=course.steps,
        batch=course.batch,
        learning_rate=course.learning_rate,
        save_every=probe_every or course.steps + 1,
        seed=course.seed,
        device=next(model.parameters()).device,
        train_sampling_strategy="sequential",  # the order is drawn above
        **course.further,
    )
    picker = Picker(slack=course.slack, judged=JUDGED) if probed else None
    trainer = PrecisionTrainer(
        model,
        objective=objective,
        presets=tuple(presets),
        switch=use,
        schedule=schedule,
        gather=lambda chosen, step: as_batch([rows[row] for row in chosen], 0),
        balance=course.balance,
        probe=Probe(held_out, tuple(presets)) if held_out is not None and probed else None,
        probe_every=probe_every,
        picker=picker,
        args=arguments,
        train_dataset=order,
    )
    began = perf_counter()
    trainer.fit()
    model.eval()
    return Outcome(trainer.state.log_history, picker, perf_counter() - began)


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
class Probe:
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
