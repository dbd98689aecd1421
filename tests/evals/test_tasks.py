"""Paper: a null model scores 0, shuffled answers chance, a gold model 100; no answer is read before it is needed."""

import dataclasses

import numpy as np
import pytest

from polybit.core.runtime import PolybitError
from polybit.evals.tasks import (
    TASKS,
    Predictions,
    answer_flips,
    embedded_items,
    gold,
    predict,
    questions,
    score,
    summarize,
)
from polybit.hub.lm import LocalLM
from tests.evals.tiny import Item, ScriptedLM, gold_lm, items, null_lm, shuffled_gold_lm

PAIRS = [(task, metric) for task, found in TASKS.items() for metric in found.metrics]


def scored(lm, task, asked):
    return score(predict(lm, task, questions(asked)), gold(asked))


@pytest.mark.parametrize(("task", "metric"), PAIRS)
def test_null_shuffled_and_gold_models(task, metric):
    """Seed finding: an evaluator that leaks the answer to an empty prediction gives a null model a good score."""
    asked = items(task)
    assert scored(null_lm(), task, asked)[metric].tolist() == [0] * 40
    assert scored(gold_lm(asked), task, asked)[metric].tolist() == [1] * 40
    chance = [scored(shuffled_gold_lm(asked, seed), task, asked)[metric].mean() for seed in range(20)]
    # a random permutation of n answers leaves one in its place on average; words in common add to F1 alone
    floor = 1 / 40 if metric != "f1" else 0.6
    assert abs(np.mean(chance) - floor) < 0.08


@pytest.mark.parametrize(("task", "metric"), PAIRS)
def test_the_same_on_the_embedded_items(task, metric):
    asked = embedded_items(60)[task]
    assert len({item.id for item in asked}) == 60
    assert scored(null_lm(), task, asked)[metric].sum() == 0
    # table lookups by question would mix up items that ask the same words of different passages
    perfect = Predictions(task, tuple(item.id for item in asked), tuple(item.answer for item in asked))
    assert score(perfect, gold(asked))[metric].mean() == 1
    turned = Predictions(task, perfect.ids, (*perfect.texts[1:], perfect.texts[0]))
    assert score(turned, gold(asked))[metric].mean() < 0.35


class Watched:
    """An item that notes when its answer is read."""

    def __init__(self, item, log):
        self.id, self.messages, self._item, self._log = item.id, item.messages, item, log

    @property
    def answer(self):
        self._log.append("answer")
        return self._item.answer

    @property
    def extras(self):
        self._log.append("answer")
        return self._item.extras


class Spy(ScriptedLM):
    """A model that notes when it generates, and keeps all it was shown."""

    def __init__(self, log):
        super().__init__({})
        self.log, self.seen = log, []

    def generate(self, prompts, *, max_tokens, stop=()):
        self.log.append("generate")
        self.seen += [repr(prompt) for prompt in prompts]
        return ["said"] * len(prompts)


def test_no_answer_is_read_before_the_prediction_is_made():
    log = []
    asked = [Watched(item, log) for item in items("reading", 5)]
    spy = Spy(log)
    predictions = predict(spy, "reading", questions(asked))
    assert log == ["generate"]
    score(predictions, gold(asked))
    assert set(log[1:]) == {"answer"}
    assert not any(item.answer in text for item in items("reading", 5) for text in spy.seen)


def test_poisoned_answers_change_no_prediction():
    asked = items("reading", 10)
    lm = gold_lm(asked)
    poisoned = [
        dataclasses.replace(item, answer="POISON", extras={"answers": {"text": ["POISON", ""]}}) for item in asked
    ]
    clean, dirty = (predict(lm, "reading", questions(them)) for them in (asked, poisoned))
    assert clean == dirty and clean.sha256 == dirty.sha256
    assert score(clean, gold(asked))["em"].all() and not score(dirty, gold(poisoned))["em"].any()


def test_changed_predictions_are_refused():
    asked = items("reading", 3)
    predictions = predict(null_lm(), "reading", questions(asked))
    with pytest.raises(dataclasses.FrozenInstanceError):
        predictions.texts = ("a", "b", "c")
    object.__setattr__(predictions, "texts", tuple(item.answer for item in asked))
    with pytest.raises(PolybitError, match="changed after"):
        score(predictions, gold(asked))


def test_several_right_answers_and_missing_ones():
    item = Item("q", ({"role": "user", "content": "?"},), "first", {"answers": {"text": ["first", "second"]}})
    assert scored(ScriptedLM({"?": "Second."}), "reading", [item])["em"].tolist() == [True]
    with pytest.raises(PolybitError, match="1 of 1 predictions"):
        score(predict(null_lm(), "reading", questions([item])), {})
    with pytest.raises(PolybitError, match="make ids unique"):
        predict(null_lm(), "reading", questions([item, item]))
    with pytest.raises(PolybitError, match="'poetry' is unknown"):
        predict(null_lm(), "poetry", questions([item]))


def test_answers_flip_while_the_score_stays():
    was = {"exact": np.array([True, True, False, False, True])}
    now = {"exact": np.array([False, True, True, False, True])}
    flips = answer_flips("dialogue", was, now)
    assert was["exact"].mean() == now["exact"].mean()
    assert [flips[name].value for name in ("flips", "correct_to_wrong", "wrong_to_correct")] == [0.4, 0.2, 0.2]
    assert summarize(was)["exact"].value == 0.6 and summarize(was)["exact"].n == 5


def test_the_embedded_model_answers_freely():
    """The whole chain on a real model: template, batched decoding, EOS, scoring."""
    tiny = pytest.importorskip("polybit.hub.tiny")
    try:
        directory = tiny.path()
    except FileNotFoundError:
        pytest.skip("the embedded model is not built")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = LocalLM(AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory))
    asked = embedded_items(24)["dialogue"]
    predictions = predict(lm, "dialogue", questions(asked))
    assert score(predictions, gold(asked))["exact"].mean() > 0.5
    one_by_one = [lm.generate([question.prompt], max_tokens=48)[0] for question in questions(asked)[:6]]
    assert list(predictions.texts[:6]) == one_by_one
