"""One training run, whatever it teaches: how it goes, what a driver brings, and what came of it.

The drivers are align.run (answers of the float model), switchable.run (rows of text) and spans.run_spans (places in a
text): each lays out its material and calls `fit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from polybit.core.runtime import PolybitError, write_json
from polybit.hub.files import read_json
from polybit.nn.switch import use
from polybit.train import world
from polybit.train.balance import Balance
from polybit.train.picker import Picker, Probed
from polybit.train.probe import forget
from polybit.train.schedules import every
from polybit.train.sharded import gather, shard
from polybit.train.table import Schedule
from polybit.train.trainer import Objective, PrecisionTrainer, Switch, settings

PARTS = "parts.json"


@dataclass(frozen=True)
class Course:
    """How a run goes.

    batch: rows of a step, in `accumulate` parts for memory · probes: how often held-out rows are read (0 = never: the
    last weights are kept) · balance: how the gradients of the presets are put together · slack: how much worse than at
    its start a preset may be before a moment is refused, as a share · patience: probes below the start before a run is
    stopped · allowed: presets of the same file that are probed and not trained -> nats of KL they may lose · exact: the
    same for trained ones that begin nearer to the float model than this (Picker) · back: how much worse than
    the best moment a probe may be before the run goes back to that and on at a third of the rate (None = it never
    does) · further: TrainingArguments.
    """

    steps: int = 200
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 3e-4
    probes: int = 5
    seed: int = 0
    balance: Balance = field(default_factory=Balance)
    slack: float = 0.0
    patience: int = 3
    allowed: Mapping[str, float] = field(default_factory=dict)
    exact: float = 0.0
    back: float | None = None
    further: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch", 1), ("accumulate", 1), ("probes", 0)):
            value = getattr(self, name)
            if value < least:
                raise PolybitError(f"{name} {value} is not possible: give {least} or more")
        if not 0 < self.learning_rate < 1:
            raise PolybitError(f"learning rate {self.learning_rate} is not possible: give a number such as 3e-4")

    def probe_every(self, renew_every: int = 0) -> int:
        """Steps between two probes, 0 = none; a multiple of the renewal, so that a resumed run renews at the same
        steps."""
        every_steps = max(1, self.steps // self.probes) if self.probes else 0
        if renew_every and every_steps:
            every_steps = max(1, every_steps // renew_every) * renew_every
        return every_steps

    def picker(self, judged: Sequence[str]) -> Picker:
        """Who chooses the moment that is kept, by these numbers of a probe."""
        return Picker(
            slack=self.slack,
            patience=self.patience,
            judged=judged,
            allowed=self.allowed,
            exact=self.exact,
            back=self.back,
        )


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """What a driver brings to a run.

    order: row numbers of all steps, one batch after another · gather(rows, step): the batch of a step · objective,
    presets, schedule, switch: PrecisionTrainer · probe: held-out numbers at every preset, of which those named in
    `judged` choose the moment that is kept; None = no probes · renew(step): called before a step, every `renew_every`
    steps.
    """

    order: Sequence[int]
    gather: Callable[[Any, int], Any]
    objective: Objective
    presets: Sequence[str]
    schedule: Schedule = every
    switch: Switch = use
    probe: Callable[[nn.Module], Probed] | None = None
    judged: Sequence[str] = ("nll", "wrong")
    renew: Callable[[int], None] | None = None
    renew_every: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a run did: its log, the probes with the reason of the choice (None without probes), seconds of wall time."""

    log: list[dict[str, Any]]
    picker: Picker | None
    seconds: float

    @property
    def start(self) -> Mapping[str, Any]:
        """Held-out numbers of every preset before training; empty without probes."""
        return self.picker.history[0]["presets"] if self.picker else {}

    @property
    def best(self) -> Mapping[str, Any]:
        """Held-out numbers of every preset at the moment that was kept; empty without probes."""
        best = self.picker.best if self.picker else None
        return best["presets"] if best else {}

    @property
    def kept(self) -> str:
        """One sentence on which moment is kept and why."""
        return "the last moment" if self.picker is None else self.picker.reason()


def fit(model: nn.Module, teaching: Teaching, course: Course, *, out: Path) -> Outcome:
    """Train `model` (from make_trainable) on the device it is on and leave its best weights in it.

    An interrupted run in `out` goes on.
    """
    torch.manual_seed(course.seed)
    probe_every = course.probe_every(teaching.renew_every) if teaching.probe is not None else 0
    parts = parts_of(out, course)
    if world.size() > 1:
        shard(model)
    arguments = settings(
        out,
        steps=course.steps,
        batch=max(1, course.batch // parts),
        learning_rate=course.learning_rate,
        save_every=probe_every or course.steps + 1,
        seed=course.seed,
        device=next(model.parameters()).device,
        train_sampling_strategy="sequential",  # the order is drawn by the driver
        gradient_accumulation_steps=parts // world.size(),
        **course.further,
    )
    picker = course.picker(teaching.judged) if probe_every else None
    trainer = PrecisionTrainer(
        model,
        objective=teaching.objective,
        presets=tuple(teaching.presets),
        switch=teaching.switch,
        schedule=teaching.schedule,
        gather=teaching.gather,
        balance=course.balance,
        probe=teaching.probe if probe_every else None,
        probe_every=probe_every,
        picker=picker,
        renew=teaching.renew,
        renew_every=teaching.renew_every,
        args=arguments,
        train_dataset=teaching.order,
    )
    began = perf_counter()
    trainer.fit()
    if world.size() > 1:
        gather(model)
    forget(model)
    model.eval()
    return Outcome(trainer.state.log_history, picker, perf_counter() - began)


def parts_of(out: Path, course: Course) -> int:
    """Into how many parts a step's batch is cut: as asked, and at least one for every process.

    Every part is a mean of its own, so that the cut decides the losses: a run keeps the one it began with.
    """
    path, processes = out / PARTS, world.size()
    if path.is_file():
        parts = int(read_json(path)["parts"])
        if parts % processes:
            raise PolybitError(
                f"this run was begun with its batches in {parts} parts, which {processes} processes cannot share: go "
                f"on with a number that divides {parts}, or give --restart"
            )
    else:
        parts = lcm(course.accumulate, processes)
    if course.batch % parts:
        raise PolybitError(
            f"a batch of {course.batch} rows cannot be cut into {parts} equal parts, for {processes} processes: choose "
            f"a multiple of {parts}"
        )
    world.wait()
    if world.first():
        write_json(path, {"parts": parts})
    return parts
