"""One alignment run: a trainable model, answers with cached references, an objective – and the best moment kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from polybit.core.runtime import PolybitError
from polybit.hub.lm import LocalLM
from polybit.train.fit import Course, Outcome, Teaching, fit
from polybit.train.material import AnswersRead, Gather, PairMaterial, kept_tokens, order_of
from polybit.train.picker import JUDGED
from polybit.train.probe import AnswerProbe, Renewal
from polybit.train.schedules import every
from polybit.train.table import Schedule


@dataclass(frozen=True, slots=True)
class Refresh:
    """How the model's own answers are made anew: every so many steps (0 = never), of at most so many tokens."""

    tokenizer: Any
    every: int = 0
    max_tokens: int = 64


def run(
    model: nn.Module,
    halves: tuple[PairMaterial, PairMaterial],
    objective: AnswersRead,
    presets: tuple[str, ...],
    *,
    out: Path,
    course: Course,
    schedule: Schedule = every,
    refresh: Refresh | None = None,
) -> Outcome:
    """Train `model` (from make_trainable) and leave its best weights in it; continues an interrupted run in `out`.

    halves: rows to train on, and held-out ones that choose the moment (PairMaterial.split).
    Raises PolybitError when there is nothing to learn from.
    """
    material, held_out = halves
    renewed = refresh is not None and bool(refresh.every)
    if "pairs" in objective.needs and not material.rejected and not renewed:
        raise PolybitError(
            "there are no answers of the quantized model, because the pairs were made with --float-only: make them "
            "without it, or let align renew them (--refresh-every 10)"
        )
    known = bool(material.rejected) and not any(material.other(row) for row in range(len(material)))
    if "pairs" in objective.needs and known:
        raise PolybitError(
            "all answers of the two models are the same, so there is no preference to learn: choose a lower precision, "
            "more or longer answers, or the method kd"
        )
    rows = order_of(len(material), course.steps * course.batch, seed=course.seed)
    renew = None
    if refresh is not None and renewed:
        renew = renewal(model, material, objective, rows, presets, course, refresh)
    teaching = Teaching(
        order=rows,
        gather=Gather(material, objective, presets),
        objective=objective,
        presets=presets,
        schedule=schedule,
        probe=AnswerProbe(held_out, (*presets, *course.allowed)),
        judged=JUDGED,
        renew=renew,
        renew_every=0 if renew is None else renew.every,
    )
    return fit(model, teaching, course, out=out)


def renewal(
    model: nn.Module,
    material: PairMaterial,
    objective: AnswersRead,
    rows: list[int],
    presets: tuple[str, ...],
    course: Course,
    refresh: Refresh,
) -> Renewal:
    """Who makes the model's own answers anew, with the teacher's distribution where the objective distils on them."""
    top = kept_tokens(model.config.get_text_config().vocab_size) if "own" in objective.needs else 0  # type: ignore
    return Renewal(
        LocalLM(model, refresh.tokenizer, keep_decoded=False),
        material,
        rows,
        presets,
        refresh.every,
        course.batch,
        refresh.max_tokens,
        top,
    )
