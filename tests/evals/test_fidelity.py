"""The fidelity judge: slow twin of the subsequence, order of criteria, thresholds, log-probabilities."""

import random

import pytest
import torch

from polybit.evals.fidelity import (
    Closeness,
    Thresholds,
    closeness,
    closeness_numbers,
    common_length,
    fidelity_numbers,
    mean_logprob,
    prefer,
    prefix_share,
    rouge_l,
)
from polybit.hub.lm import LocalLM
from tests.evals.models import KnowsNext, Uniform
from tests.evals.tiny import tokenizer


def slow_common_length(first, second):
    """The textbook table."""
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first, start=1):
        for j, b in enumerate(second, start=1):
            table[i][j] = table[i - 1][j - 1] + 1 if a == b else max(table[i - 1][j], table[i][j - 1])
    return table[-1][-1]


@pytest.mark.parametrize("seed", range(60))
def test_common_length_is_the_textbook_table(seed):
    rng = random.Random(seed)
    first, second = ([rng.randrange(1 + seed % 7) for _ in range(rng.randrange(0, 90))] for _ in range(2))
    assert common_length(first, second) == slow_common_length(first, second)


def test_rouge_and_prefix():
    assert rouge_l([1, 2, 3, 4], [1, 3, 4]) == 2 * 3 / 7
    assert rouge_l([], []) == 1 and rouge_l([1], []) == 0
    assert prefix_share([1, 2, 3, 4], [1, 2, 9, 9]) == 0.5
    assert prefix_share([1, 2], [1, 2]) == 1
    assert prefix_share([1, 2], [1, 2, 3, 4]) == 0.5, "an answer that goes on is not the same"


def test_criteria_decide_in_order():
    base = Closeness(False, 0.5, 0.5, -1.0)
    assert prefer(Closeness(True, 1, 1, -1), base) == ("win", "exact")
    assert prefer(Closeness(False, 0.9, 0.1, -9), base) == ("win", "prefix")
    assert prefer(Closeness(False, 0.51, 0.1, -0.1), base) == ("lose", "rouge_l")
    assert prefer(Closeness(False, 0.51, 0.51, -0.1), base) == ("win", "nats")
    assert prefer(Closeness(False, 0.51, 0.51, -1.01), base) == ("tie", "none")
    assert prefer(Closeness(False, 0.51, 0.5, -1), base, Thresholds(prefix=0)) == ("win", "prefix")
    empty = Closeness(False, 0, 0, float("-inf"))
    assert prefer(empty, empty) == ("tie", "none")
    assert prefer(empty, Closeness(False, 0, 0, -3.0)) == ("lose", "nats")


@pytest.mark.parametrize("seed", range(20))
def test_swapping_the_sides_swaps_the_verdict(seed):
    rng = random.Random(seed)
    a, b = (Closeness(rng.random() < 0.2, rng.random(), rng.random(), -rng.random()) for _ in range(2))
    opposite = {"win": "lose", "lose": "win", "tie": "tie"}
    assert prefer(b, a) == (opposite[prefer(a, b)[0]], prefer(a, b)[1])


def test_rates_are_paired_and_labelled():
    good = [closeness([1, 2, 3], [1, 2, 3], 0.0)] * 30
    bad = [closeness([1, 2, 3], [9, 2, 3], -1.0)] * 30
    numbers = fidelity_numbers(good, bad, clusters=[n // 2 for n in range(30)])
    assert numbers["win"]["value"] == 1 and numbers["win"]["n"] == 15 and numbers["decided_by"] == {"exact": 30}
    assert "not quality" in numbers["judge"]
    assert fidelity_numbers(good, good)["tie"]["value"] == 1
    assert closeness_numbers(bad)["rouge_l"]["value"] == pytest.approx(2 / 3)
    assert closeness_numbers([closeness([1], [], float("-inf"))])["nats"] is None


def test_log_probabilities():
    lm = LocalLM(Uniform(), tokenizer())
    found = mean_logprob(lm, [[1], [1, 5]], [[4, 5, 6], []])
    assert found[0] == pytest.approx(-torch.tensor(96.0).log().item(), abs=1e-5) and found[1] == float("-inf")
    sure = LocalLM(KnowsNext(), tokenizer())
    assert mean_logprob(sure, [[4], [4]], [[5, 6], [9, 9]])[0] > -1e-5 > mean_logprob(sure, [[4]], [[9, 9]])[0] + 5
