"""What the two heads of `train` do differently: what is read, what is learnt, how it is measured."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from torch import nn

from polybit.acts.train_start import Pupil, pupil_of_spans, pupil_of_words
from polybit.core.plan import Plan
from polybit.core.runtime import PolybitError
from polybit.data.lessons import read_lessons
from polybit.data.spans import span_targets, span_windows
from polybit.data.squad import Asked, choose, open_squad
from polybit.data.table import EMBEDDED
from polybit.hub.lm import longest_input
from polybit.hub.models import device_of, open_model
from polybit.options.train import TrainOptions
from polybit.robust.embeddings import Adversarial
from polybit.train.cascade import FLOAT, Agreement
from polybit.train.fit import Course, Outcome
from polybit.train.spans import SpanProbe, SpanRow, SpanScores, pose, run_spans
from polybit.train.switchable import LessonProbe
from polybit.train.switchable import run as run_words
from polybit.train.table import LESSON_OBJECTIVES, LessonKnobs, Schedule

HELD_OUT_SHARE, HELD_OUT_MOST = 0.1, 200
EMBEDDED_LESSONS, EMBEDDED_QUESTIONS = 2000, 1000
WORDS_LENGTH, SPANS_LENGTH, SPANS_STRIDE = 512, 384, 128
Scores = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a pupil reads: rows to train on and held-out rows, both of the head's own kind, and how many there are."""

    rows: Any
    held_out: Any
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Head:
    """One kind of answer that can be trained.

    pupil: the model made trainable · reading: its data · objective: what is learnt · run: one run of training, given
    (pupil, reading, objective, out, course, schedule) · measure: held-out nats per token, share of wrong tokens and KL
    to the float model, at every preset and in float.
    """

    pupil: Callable[[str, TrainOptions, Mapping[str, Plan]], Pupil]
    reading: Callable[[Pupil, TrainOptions], Reading]
    objective: Callable[[Pupil, TrainOptions], Any]
    run: Callable[[Pupil, Reading, Any, Path, Course, Schedule], Outcome]
    measure: Callable[[Pupil, Reading], Scores]


def lessons(pupil: Pupil, options: TrainOptions) -> Reading:
    """Rows of tokens to say."""
    longest = longest_input(pupil.model)
    length = options.length or min(longest or WORDS_LENGTH, WORDS_LENGTH)
    if longest is not None and length > longest:
        raise PolybitError(f"--length {length} is longer than the model's context of {longest}: give at most {longest}")
    count = options.rows or (EMBEDDED_LESSONS if options.data == EMBEDDED else None)
    found = read_lessons(options.data, pupil.tokenizer, length=length, count=count, seed=options.seed)
    if found.too_long:
        print(
            f"polybit: warning: {found.too_long} of {found.too_long + len(found.rows)} rows are longer than {length} "
            "tokens and left out",
            file=sys.stderr,
        )
    rows, held_out = found.split(held_out_of(len(found.rows), options), seed=options.seed)
    counts = {"rows": len(rows.rows), "held_out": len(held_out.rows), "too_long": rows.too_long}
    return Reading(rows, held_out, counts)


def windows(pupil: Pupil, options: TrainOptions) -> Reading:
    """Windows of text with the places of the answers; no question has windows in both parts."""
    length = min(options.length or SPANS_LENGTH, longest_input(pupil.model) or SPANS_LENGTH)
    with tempfile.TemporaryDirectory(prefix="polybit-train-") as folder:
        count = options.rows or EMBEDDED_QUESTIONS
        file = open_squad(options.data, Path(folder), count=count, seed=options.seed, split="train")
        asked, answers = choose(file.questions(), options.rows, options.seed), file.answers()
    Random(options.seed).shuffle(asked)
    held_out = held_out_of(len(asked), options)
    if len(asked) <= held_out:
        raise PolybitError(
            f"{len(asked)} questions cannot give {held_out} held-out ones and some to train on: add more"
        )

    def rows(part: Sequence[Asked]) -> list[SpanRow]:
        found = span_windows(pupil.tokenizer, part, length=length, stride=min(SPANS_STRIDE, length // 3))
        places = span_targets(found, part, answers)
        return [SpanRow(window.ids, *place) for window, place in zip(found, places, strict=True)]

    learnt, kept = rows(asked[held_out:]), rows(asked[:held_out])
    return Reading(learnt, kept, {"rows": len(learnt), "held_out": len(kept), "too_long": 0})


def held_out_of(rows: int, options: TrainOptions) -> int:
    """How many of so many rows are held out."""
    return options.held_out or max(1, min(HELD_OUT_MOST, int(rows * HELD_OUT_SHARE)))


def say(pupil: Pupil, options: TrainOptions) -> Any:
    """The objective over words; with --norms the float model teaches as a model of its own."""
    source = None
    if options.norms and options.teacher:
        source = open_model(pupil.parent, trust_remote_code=options.trust_remote_code)[0]
        source = source.to(device_of(options.device))
    taught = LESSON_OBJECTIVES[options.method].build(knobs(options, source=source))
    terms = (options.consistency, options.alignment, options.switchability)
    if any(terms):
        return Agreement(taught, pupil.model, *terms)
    if options.adversarial:
        return Adversarial(taught, pupil.model, epsilon=options.adversarial, seed=options.seed)
    return taught


def point(pupil: Pupil, options: TrainOptions) -> Any:
    """The objective over places."""
    return LESSON_OBJECTIVES[options.method].build(knobs(options, pose=pose))


def knobs(options: TrainOptions, *, source: nn.Module | None = None, pose: Any = None) -> LessonKnobs:
    """What the flags say of an objective."""
    return LessonKnobs(
        distance=options.distance,
        beta=options.beta,
        data=options.labels,
        teacher=options.teacher,
        source=source,
        pose=pose,
    )


def run_lessons(
    pupil: Pupil, reading: Reading, objective: Any, out: Path, course: Course, schedule: Schedule
) -> Outcome:
    """One run over rows of tokens."""
    presets, held_out = tuple(pupil.plans), reading.held_out
    return run_words(
        pupil.model, reading.rows, objective, presets, out=out, course=course, schedule=schedule, held_out=held_out
    )


def run_windows(
    pupil: Pupil, reading: Reading, objective: Any, out: Path, course: Course, schedule: Schedule
) -> Outcome:
    """One run over windows of text."""
    presets, fill = tuple(pupil.plans), pupil.tokenizer.pad_token_id or 0
    where: dict[str, Any] = {"out": out, "course": course, "schedule": schedule, "fill": fill}
    return run_spans(pupil.model, reading.rows, reading.held_out, objective, presets, **where)


def measure_lessons(pupil: Pupil, reading: Reading) -> Scores:
    """Over the learnt tokens."""
    return LessonProbe(reading.held_out, (*pupil.plans, FLOAT))(pupil.model)


def measure_windows(pupil: Pupil, reading: Reading) -> Scores:
    """Over the starts and ends."""
    found = SpanProbe(reading.held_out, (*pupil.plans, FLOAT), 0)(SpanScores(pupil.model))
    return {name: dict(values) for name, values in found.items()}


HEADS = {
    "lm": Head(pupil_of_words, lessons, say, run_lessons, measure_lessons),
    "span": Head(pupil_of_spans, windows, point, run_windows, measure_windows),
}
