"""Tasks with one right answer: reading, arithmetic, dialogue. Predictions are frozen before any answer is read.

The order is in the types: `predict` takes questions, which hold no answer, and returns sealed `Predictions`; only
`score` takes answers, and it takes nothing that could still generate.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from polybit.core.parts import load
from polybit.core.records import Estimate
from polybit.core.runtime import PolybitError
from polybit.data import synth
from polybit.data.chat import Prompt
from polybit.evals.scoring import bootstrap
from polybit.evals.table import TASKS, AnswerTask
from polybit.hub.lm import LM, LocalLM

Scores = dict[str, NDArray[Any]]


class TaskItem(Protocol):
    """What a data set gives: a prompt and its right answer (polybit.data.synth.Item is one)."""

    @property
    def id(self) -> str:
        """A name that no other item of the task has."""
        ...

    @property
    def messages(self) -> Sequence[dict[str, str]]:
        """The conversation up to the user's question."""
        ...

    @property
    def answer(self) -> str:
        """The right reply."""
        ...

    @property
    def extras(self) -> Mapping[str, Any]:
        """Further right answers, as SQuAD has them: {"answers": {"text": [...]}}."""
        ...


@dataclass(frozen=True, slots=True)
class TaskQuestion:
    """An item without its answer: all a model ever sees."""

    id: str
    prompt: Prompt


def seal(task: str, ids: Sequence[str], texts: Sequence[str]) -> str:
    """sha256 over a task's name and its (id, text) pairs in order."""
    content = json.dumps([task, *zip(ids, texts, strict=True)], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", errors="surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Predictions:
    """A model's answers, sealed when they are made: `sha256` covers every id and text."""

    task: str
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha256", seal(self.task, self.ids, self.texts))

    def check_seal(self) -> None:
        """Refuse answers that were changed after they were made."""
        if seal(self.task, self.ids, self.texts) != self.sha256:
            raise PolybitError(f"Predictions for {self.task!r} were changed after they were made; predict again.")


def find_task(name: str) -> AnswerTask:
    """A task by name."""
    if name not in TASKS:
        raise PolybitError(f"Task {name!r} is unknown; choose one of {', '.join(TASKS)}.")
    return TASKS[name]


def questions(items: Sequence[TaskItem]) -> list[TaskQuestion]:
    """The items without their answers."""
    return [TaskQuestion(item.id, [dict(message) for message in item.messages]) for item in items]


def gold(items: Sequence[TaskItem]) -> dict[str, tuple[str, ...]]:
    """Right answers by item id."""
    found = {}
    for item in items:
        several = item.extras.get("answers") if item.extras else None
        texts = several.get("text") if isinstance(several, Mapping) else None
        found[item.id] = tuple(texts) if texts else (item.answer,)
    return found


def predict(lm: LM, task: str, asked: Sequence[TaskQuestion]) -> Predictions:
    """Let a model answer every question, greedily and running free, and seal what it said."""
    ids = tuple(question.id for question in asked)
    if len(set(ids)) != len(ids):
        raise PolybitError(
            f"Task {task!r} has {len(ids) - len(set(ids))} items with an id of another; make ids unique."
        )
    texts = lm.generate([question.prompt for question in asked], max_tokens=find_task(task).max_tokens)
    return Predictions(task, ids, tuple(texts))


def predicted(
    reference: LocalLM,
    quantized: LocalLM,
    of_reference: bool,
    preset: str | None,
    task: str,
    asked: Sequence[TaskQuestion],
) -> Predictions:
    """`predict` of one of two models, the quantized one at a preset."""
    lm = reference if of_reference else quantized
    with lm.at(None if of_reference else preset):
        return predict(lm, task, asked)


def score(predictions: Predictions, answers: Mapping[str, Sequence[str]]) -> Scores:
    """Every metric of the task for each item, in the order of the predictions; yes/no metrics as bool arrays."""
    predictions.check_seal()
    task = find_task(predictions.task)
    missing = [name for name in predictions.ids if name not in answers]
    if missing:
        raise PolybitError(
            f"{len(missing)} of {len(predictions.ids)} predictions of {predictions.task!r} have no right answer, "
            f"first {missing[0]!r}; score them with the answers of the same items."
        )
    pairs = [(text, answers[name]) for name, text in zip(predictions.ids, predictions.texts, strict=True)]
    return {
        name: np.array([load(path)(*pair) for pair in pairs], dtype=bool if name in task.rates else np.float64)
        for name, path in task.metrics.items()
    }


def summarize(scores: Scores, *, seed: int = 0) -> dict[str, Estimate]:
    """Mean of each metric over items, 0..1, with its interval."""
    return {name: bootstrap(values, seed=seed) for name, values in scores.items()}


def answer_flips(task: str, reference: Scores, quantized: Scores, *, seed: int = 0) -> dict[str, Estimate]:
    """How many answers changed between right and wrong, paired by item, as shares of all items.

    flips = correct_to_wrong + wrong_to_correct ("Accuracy is Not All You Need", arXiv 2407.09141): the accuracy can
    stay the same while many answers change.
    """
    correct = find_task(task).correct
    was, now = reference[correct].astype(bool), quantized[correct].astype(bool)
    changes = {"flips": was != now, "correct_to_wrong": was & ~now, "wrong_to_correct": ~was & now}
    return {name: bootstrap(values, seed=seed) for name, values in changes.items()}


def embedded_items(n: int, *, seed: int = 0) -> dict[str, list[TaskItem]]:
    """`n` held-out items of each embedded task: names and wordings no training document had."""
    return {name: list(synth.items(name, n, seed, split="test")) for name in TASKS}
