"""Reference: the official scorers written out, the bootstrap one resample at a time, intervals that cover."""

import math
import re
import string
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polybit.core.records import Estimate
from polybit.core.runtime import PolybitError
from polybit.evals.scoring import (
    RESAMPLES,
    bootstrap,
    exponentiate,
    gsm8k_exact,
    gsm8k_number,
    normalize_answer,
    rates_by_bin,
    squad_exact,
    squad_f1,
    text_exact,
)


def official_normalize(s):
    """The four steps of evaluate-v1.1, in its order."""
    lowered = s.lower()
    without_punctuation = "".join(ch for ch in lowered if ch not in set(string.punctuation))
    without_articles = re.sub(r"\b(a|an|the)\b", " ", without_punctuation)
    return " ".join(without_articles.split())


def official_f1(prediction, truth):
    """The word overlap of evaluate-v1.1."""
    prediction_tokens, truth_tokens = official_normalize(prediction).split(), official_normalize(truth).split()
    common = Counter(prediction_tokens) & Counter(truth_tokens)
    num_same = sum(common.values())
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(prediction_tokens)
    recall = 1.0 * num_same / len(truth_tokens)
    return (2 * precision * recall) / (precision + recall)


WORDS = st.lists(st.sampled_from(["the", "a", "An", "cat", "cat's", "Cat", "42", "-", "sat,", "in", "x"]), max_size=8)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_squad_equals_the_official_script(prediction, answers):
    text, truths = " ".join(prediction), [" ".join(words) for words in answers]
    assert normalize_answer(text) == official_normalize(text)
    assert squad_exact(text, truths) == max(official_normalize(text) == official_normalize(t) for t in truths)
    assert squad_f1(text, truths) == max(official_f1(text, t) for t in truths)


def test_squad_examples():
    broncos = ["Denver Broncos", "Denver Broncos", "The Denver Broncos!"]
    assert squad_exact("the denver broncos", broncos) == squad_f1("the denver broncos", broncos) == 1
    assert squad_exact("Broncos", broncos) == 0 and squad_f1("Broncos", broncos) == pytest.approx(2 / 3)
    assert squad_f1("cat cat sat", ["cat sat sat"]) == pytest.approx(2 / 3)  # words count as often as they occur
    assert squad_f1("cat cat cat cat", ["cat"]) == pytest.approx(2 / 5)  # a set would have said 1
    assert squad_exact("", ["gold"]) == squad_f1("", ["gold"]) == 0
    assert normalize_answer("  An\tApple-pie, (the) BEST! ") == "applepie best"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2+3=5. #### 5", "5"),
        ("#### 1,234", "1234"),
        ("#### -7", "-7"),
        ("####12.", "12"),
        ("#### 3.50", "3.50"),
        ("so #### 8 and #### 9", "8"),
        ("the answer is 5", None),
        ("#### none", None),
        ("#### ,", None),
        ("", None),
    ],
)
def test_gsm8k_number(text, number):
    assert gsm8k_number(text) == number


def test_exact_matches():
    assert gsm8k_exact("1+1=2 #### 2", "#### 2") == 1 and gsm8k_exact("#### 3", "#### 2") == 0
    assert gsm8k_exact("nothing", "nothing") == 0  # no number is never right, even against no number
    assert text_exact(" Hi. ", "Hi.") == 1 and text_exact("hi.", "Hi.") == 0


def bootstrap_twin(values, clusters, seed):
    """One resample after the other, one cluster after the other."""
    names = sorted(set(clusters))
    groups = [[v for v, c in zip(values, clusters, strict=True) if c == name] for name in names]
    means = []
    for draw in np.random.default_rng(seed).integers(len(groups), size=(RESAMPLES, len(groups))):
        drawn = [value for index in draw for value in groups[index]]
        means.append(sum(drawn) / len(drawn))
    return np.percentile(means, 2.5), np.percentile(means, 97.5)


def test_bootstrap_equals_the_loop():
    generator = np.random.default_rng(3)
    values, clusters = generator.normal(size=57), generator.integers(9, size=57)
    got = bootstrap(values, clusters=clusters, seed=4)
    low, high = bootstrap_twin(values.tolist(), clusters.tolist(), 4)
    assert got.value == pytest.approx(values.mean()) and got.n == len(set(clusters.tolist()))
    assert (got.low, got.high) == (pytest.approx(low), pytest.approx(high))
    alone = bootstrap(values, seed=4)
    assert (alone.low, alone.high, alone.n) == (
        *map(pytest.approx, bootstrap_twin(values.tolist(), range(57), 4)),
        57,
    )


def test_intervals_cover_as_often_as_they_claim():
    generator = np.random.default_rng(0)
    hits = clustered_hits = plain_hits = 0
    for trial in range(100):
        got = bootstrap(generator.normal(size=80), seed=trial)
        hits += got.low <= 0 <= got.high
        # five equal tokens in each of 40 texts: only resampling texts knows how little that is
        texts = np.repeat(generator.normal(size=40), 5)
        clustered = bootstrap(texts, clusters=np.repeat(np.arange(40), 5), seed=trial)
        clustered_hits += clustered.low <= 0 <= clustered.high
        plain = bootstrap(texts, seed=trial)
        plain_hits += plain.low <= 0 <= plain.high
    assert 88 <= hits <= 99 and 86 <= clustered_hits <= 99 and plain_hits < 75


def test_pairing_removes_what_is_shared():
    generator = np.random.default_rng(1)
    base = generator.normal(size=100) * 10
    ours = base + 0.5 + generator.normal(size=100) * 0.1
    paired = bootstrap(ours, paired_with=base)
    assert paired.value == pytest.approx((ours - base).mean()) and paired.high - paired.low < 0.1
    alone = bootstrap(ours)
    assert alone.high - alone.low > 2


def test_rates_of_zero_and_one_are_not_certain():
    none, every = bootstrap(np.zeros(50, dtype=bool)), bootstrap(np.ones(50, dtype=bool))
    assert (none.value, none.low, every.value, every.high) == (0, 0, 1, 1)
    # Clopper-Pearson for 0 of 50 at 95 %: 0.0711
    assert none.high == pytest.approx(0.0711, abs=1e-4) and every.low == pytest.approx(1 - 0.0711, abs=1e-4)
    assert bootstrap(np.zeros(50)).high == 0  # a mean of measured zeros is zero


def test_same_seed_same_interval_and_scale():
    values = np.arange(30.0)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1) != bootstrap(values, seed=2)
    assert exponentiate(Estimate(0.0, -1.0, 1.0, 5)) == Estimate(1.0, math.exp(-1), math.e, 5)
    assert math.isfinite(exponentiate(Estimate(1e4, 1e3, 1e5, 5)).high)


def test_rates_by_bin():
    events, bins = np.array([True, False, True, True, False, False]), np.array([0, 0, 2, 2, 2, 2])
    first, second, third = rates_by_bin(events, bins, 3, clusters=[0, 1, 0, 1, 2, 3])
    assert (first.value, first.n, second, third.value, third.n) == (0.5, 2, None, 0.5, 4)
    assert 0 <= third.low <= third.value <= third.high <= 1


def test_what_has_no_mean_is_refused():
    for wrong in ([], [[1.0]], [1.0, math.nan], [math.inf]):
        with pytest.raises(PolybitError):
            bootstrap(wrong)
    with pytest.raises(PolybitError, match="same items"):
        bootstrap([1.0, 2.0], paired_with=[1.0])
    with pytest.raises(PolybitError, match="needs a cluster"):
        bootstrap([1.0, 2.0], clusters=[1])
