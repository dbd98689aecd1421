"""One alignment run: a trainable model, answers with cached references, an objective – and the best moment kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from polybit.core.runtime import PolybitError
from polybit.hub.lm import LocalLM
from polybit.train.balance import Balance, inverse_losses
from polybit.train.latent import use
from polybit.train.material import Gather, Material, kept_tokens, order_of
from polybit.train.picker import Picker
from polybit.train.probe import Probe, Renewal, forget
from polybit.train.trainer import PrecisionTrainer, Schedule, every_preset, settings

Share = Literal["sum", "loss", "gradient", "project"]


@dataclass(frozen=True)
class Course:
    """How a run goes.

    batch: prompts per step · probes: how often held-out flips and KL are measured · refresh_every: steps between two
    renewals of the quantized answers, 0 = never · share: how several widths share the weights: "sum" of their losses,
    "loss" = each weighted by 1/its loss at the start, "gradient" = equal lengths of gradients, "project" = those
    without what works against another · patience: probes below the start before a run is stopped · allowed: presets of
    the same file that are probed and not trained -> nats of KL they may lose · exact: the same for trained ones that
    begin nearer to the float model than this (Picker).
    """

    steps: int = 150
    batch: int = 16
    learning_rate: float = 3e-4
    probes: int = 10
    refresh_every: int = 0
    max_tokens: int = 64
    share: Share = "loss"
    patience: int = 3
    seed: int = 0
    schedule: Schedule = every_preset
    allowed: Mapping[str, float] = field(default_factory=dict)
    exact: float = 0.0
    further: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("steps", self.steps), ("batch", self.batch), ("probes", self.probes)):
            if value < 1:
                raise PolybitError(f"{name} {value} is not possible: give 1 or more")
        if not 0 < self.learning_rate < 1:
            raise PolybitError(f"learning rate {self.learning_rate} is not possible: give a number such as 3e-4")

    @property
    def probe_every(self) -> int:
        """Steps between two probes; a multiple of the refresh, so that a resumed run renews at the same steps."""
        every = max(1, self.steps // self.probes)
        if self.refresh_every:
            every = max(1, every // self.refresh_every) * self.refresh_every
        return every


@dataclass(frozen=True)
class Outcome:
    """What a run did: the probes with the reason of the choice, and the log of the training."""

    picker: Picker
    log: list[dict[str, Any]]
    seconds: float

    @property
    def start(self) -> Mapping[str, Any]:
        """Held-out numbers of every preset before training."""
        return self.picker.history[0]["presets"]

    @property
    def best(self) -> Mapping[str, Any]:
        """Held-out numbers of every preset at the moment that was kept."""
        best = self.picker.best
        assert best is not None
        return best["presets"]


def run(
    model: nn.Module,
    tokenizer: Any,
    material: Material,
    held_out: Material,
    objective: Any,
    presets: tuple[str, ...],
    *,
    out: Path,
    course: Course,
) -> Outcome:
    """Train `model` (from make_trainable) and leave its best weights in it; continues an interrupted run in `out`.

    Raises PolybitError when there is nothing to learn from.
    """
    if needs_pairs(objective) and not any(material.other(row) for row in range(len(material))):
        raise PolybitError(
            "all answers of the two models are the same, so there is no preference to learn: choose a lower precision, "
            "more or longer answers, or the method kd"
        )
    torch.manual_seed(course.seed)
    rows = order_of(len(material), course.steps * course.batch, seed=course.seed)
    probe = Probe(held_out, (*presets, *course.allowed))
    renewal = None
    if course.refresh_every:
        top = kept_tokens(model.config.get_text_config().vocab_size) if needs_own(objective) else 0  # type: ignore
        renewal = Renewal(
            LocalLM(model, tokenizer, keep_decoded=False),
            material,
            rows,
            presets,
            course.refresh_every,
            course.batch,
            course.max_tokens,
            top,
        )
    accumulation = int(course.further.get("gradient_accumulation_steps", 1))
    arguments = settings(
        out,
        steps=course.steps,
        batch=max(1, course.batch // accumulation),
        learning_rate=course.learning_rate,
        save_every=course.probe_every,
        seed=course.seed,
        device=next(model.parameters()).device,
        train_sampling_strategy="sequential",  # the order is drawn above
        **course.further,
    )
    picker = Picker(patience=course.patience, allowed=course.allowed, exact=course.exact)
    trainer = PrecisionTrainer(
        model,
        objective=objective,
        presets=presets,
        switch=use,
        schedule=course.schedule,
        gather=Gather(material, objective, presets),
        probe=probe,
        probe_every=course.probe_every,
        picker=picker,
        renew=renewal,
        renew_every=course.refresh_every,
        args=arguments,
        train_dataset=rows,
    )
    trainer.begin()
    if len(presets) > 1:
        trainer.balance = balance_of(course.share, picker)
    trainer.fit()
    forget(model)
    lasted = next(
        (entry["train_runtime"] for entry in reversed(trainer.state.log_history) if "train_runtime" in entry), 0
    )
    return Outcome(picker, trainer.state.log_history, float(lasted))


def balance_of(share: Share, picker: Picker) -> Balance:
    """The balance of several widths, from their KL at the start where it is by loss."""
    if share == "loss":
        start = picker.history[0]["presets"]
        return Balance("sum", inverse_losses({name: numbers["kl"] for name, numbers in start.items()}))
    return Balance(share)


def needs_pairs(objective: Any) -> bool:
    """Whether any stage of an objective learns from pairs."""
    return any("pairs" in part.needs for part in parts_of(objective))


def needs_own(objective: Any) -> bool:
    """Whether any stage distils on the model's own answers."""
    return any("own" in part.needs for part in parts_of(objective))


def parts_of(objective: Any) -> list[Any]:
    """The stages of an objective."""
    return [part for part, _ in objective.parts] if hasattr(objective, "parts") else [objective]
