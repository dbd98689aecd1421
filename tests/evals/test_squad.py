"""The gate of the SQuAD evaluation: null, shuffled-gold, random-span and gold models score as they must."""

import json
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch

from polybit.core.runtime import PolybitError
from polybit.data import synth
from polybit.data.spans import Window
from polybit.data.squad import Answer, SquadFile, write_squad
from polybit.evals import squad
from polybit.evals.squad import best_span, f1, freeze, normalize_korean, run, score, summarize, thaw
from polybit.evals.tasks import Predictions


@pytest.fixture
def file(tmp_path):
    return write_squad(tmp_path / "reading.json", synth.items("reading", 300, 5))


def mean(scores, name):
    return float(np.mean(scores[name]))


def test_null_model_scores_nothing(file, tmp_path):
    scores = run(lambda asked: [""] * len(asked), file.questions(), file, tmp_path / "p.json")
    assert mean(scores, "em") == mean(scores, "f1") == 0


def test_stop_words_score_nothing(file, tmp_path):
    """The word salad that passed for robustness elsewhere: the normaliser leaves nothing of it."""
    scores = run(lambda asked: ["the a, an the."] * len(asked), file.questions(), file, tmp_path / "p.json")
    assert mean(scores, "em") == mean(scores, "f1") == 0


def test_gold_model_scores_everything(file, tmp_path):
    gold = file.answers()
    scores = run(lambda asked: [gold[one.id][0].text for one in asked], file.questions(), file, tmp_path / "p.json")
    assert mean(scores, "em") == mean(scores, "f1") == 1


def test_shuffled_gold_scores_as_often_as_two_answers_are_equal(file, tmp_path):
    gold = [answers[0].text for answers in file.answers().values()]
    counts = Counter(gold)
    chance = sum(n * (n - 1) for n in counts.values()) / (len(gold) * (len(gold) - 1))
    found = []
    for seed in range(10):
        shuffled = Random(seed).sample(gold, len(gold))
        scores = run(lambda asked, said=shuffled: said, file.questions(), file, tmp_path / "p.json")
        found.append(mean(scores, "em"))
    assert abs(np.mean(found) - chance) < 0.03 and np.mean(found) < 0.2


def test_random_spans_score_little(file, tmp_path):
    rng = Random(0)

    def guess(asked):
        said = []
        for one in asked:
            words = one.context.split()
            start = rng.randrange(len(words))
            said.append(" ".join(words[start : start + rng.randint(1, 4)]))
        return said

    scores = run(guess, file.questions(), file, tmp_path / "p.json")
    assert mean(scores, "em") < 0.08 and 0.0 < mean(scores, "f1") < 0.2


def test_a_reference_is_read_only_after_predictions_are_on_disk(file, tmp_path):
    path = tmp_path / "p.json"

    class Watching:
        def answers(self):
            assert thaw(path).texts, "predictions must lie on disk before an answer is read"
            return file.answers()

    def answerer(asked):
        assert not any(hasattr(one, name) for one in asked for name in ("answers", "answer"))
        assert not path.exists()
        return ["x"] * len(asked)

    run(answerer, file.questions(), Watching(), path)


def test_frozen_predictions_cannot_be_changed(tmp_path):
    path = freeze(Predictions("squad", ("a", "b"), ("one", "two")), tmp_path / "p.json")
    assert thaw(path).texts == ("one", "two")
    path.write_text(path.read_text().replace("two", "right answer"))
    with pytest.raises(PolybitError, match="changed after they were made"):
        thaw(path)
    path.write_text("{}")
    with pytest.raises(PolybitError, match="holds no predictions"):
        thaw(path)


def test_official_scores():
    """Cases whose official scores (evaluate-v1.1.py, evaluate-v2.0.py) follow from the published rules."""
    answers = {
        "article": (Answer("the Eiffel Tower"), Answer("Eiffel tower in Paris")),
        "half": (Answer("in the year 1066"),),
        "none": (),
        "spoken": (),
        "case": (Answer("U.S. dollars"),),
    }
    said = {"article": "Eiffel Tower!", "half": "1066 AD", "none": "", "spoken": "Paris", "case": "us Dollars"}
    scores = score(Predictions("squad", tuple(said), tuple(said.values())), answers)
    assert scores["em"].tolist() == [True, False, True, False, True]
    assert scores["f1"].tolist() == pytest.approx([1, 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3), 1, 0, 1])
    rows = summarize(scores)
    assert rows["em_has_answer"].n == 3 and rows["em_no_answer"].value == 0.5


def test_korean_scores_count_characters():
    assert normalize_korean("《사랑의 불시착》!") == "사랑의 불시착"
    answers = {"a": (Answer("1989년 2월 15일"),), "b": (Answer("임종석"),)}
    scores = score(Predictions("squad", ("a", "b"), ("1989년 2월 15일", "임종석이")), answers, korean=True)
    assert scores["em"].tolist() == [True, False]
    assert scores["f1"][1] == pytest.approx(2 * 3 / 7)


def test_f1_of_nothing():
    assert f1([], []) == 1 and f1(["a"], []) == 0 and f1([], ["a"]) == 0 and f1(["a"], ["b"]) == 0


def window(length=40, question=9):
    offsets = tuple(None if n < question else (3 * (n - question), 3 * (n - question) + 2) for n in range(length))
    return Window(0, tuple(range(length)), offsets)


def test_best_span_equals_trying_every_pair():
    context = "".join(chr(97 + n % 26) for n in range(100))
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        start, end = torch.randn(40, generator=generator), torch.randn(40, generator=generator)
        best = max(
            (float(start[i] + end[j]), i, j) for i in range(9, 40) for j in range(i, min(40, i + squad.LONGEST_ANSWER))
        )
        found = best_span(window(), start, end, context, n_best=40)
        assert found[0] == pytest.approx(best[0])
        assert found[1] == context[3 * (best[1] - 9) : 3 * (best[2] - 9) + 2]


def test_best_span_never_leaves_the_text():
    start, end = torch.zeros(40), torch.zeros(40)
    start[2] = end[3] = 100.0  # the question itself
    assert best_span(window(), start, end, "x" * 200)[0] == 0.0


def test_questions_without_answers_are_refused(tmp_path, file):
    value = json.loads(file.path.read_text())
    del value["data"][0]["paragraphs"][3]["qas"][0]["answers"]
    path = tmp_path / "blind.json"
    path.write_text(json.dumps(value))
    questions = SquadFile(path).questions()
    assert len(questions) == 300
    with pytest.raises(PolybitError, match=r"1 of 300 questions .* have no answer"):
        run(lambda asked: [""] * len(asked), questions, SquadFile(path), tmp_path / "p.json")
    with pytest.raises(PolybitError, match="no right answer"):
        score(Predictions("squad", ("x",), ("y",)), {})
