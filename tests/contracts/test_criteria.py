"""What every mixture criterion of the table promises: one score per mixture, whatever the text's length, again."""

import math

import pytest
import torch

from polybit.core.parts import load
from polybit.measure.mixture import search_mixtures
from polybit.measure.table import CRITERIA
from polybit.nn.convert import targets
from tests.families import tiny_model
from tests.measure.test_mixture import text

everyone = pytest.mark.parametrize("name", CRITERIA)
SOURCES = {"stories": text(1, 3, 40), "sums": text(2, 40, 60)}


def search(name, sources=SOURCES):
    model = tiny_model("llama")
    return search_mixtures(model, sources, targets(model), general=["stories"], criteria=[name], step=0.25)[name]


@everyone
def test_says_what_it_is(name):
    part = CRITERIA[name]
    assert part.summary and not part.summary.endswith(".") and part.target in ("family", "tasks")
    assert load(part.function).__doc__


@everyone
def test_every_mixture_has_a_score_and_the_best_is_the_highest(name):
    found = search(name)
    assert [point.weights[0] for point in found.points] == [0, 0.25, 0.5, 0.75, 1]
    assert all(math.isfinite(point.score) for point in found.points)
    assert found.best.score == max(point.score for point in found.points)
    assert all((point.erank_ratio is not None) == CRITERIA[name].needs_rank for point in found.points)
    assert found == search(name)


@everyone
def test_a_longer_text_of_the_same_kind_changes_nothing(name):
    twice = {source: [*batches, *batches] for source, batches in SOURCES.items()}
    for one, other in zip(search(name).points, search(name, twice).points, strict=True):
        assert other.score == pytest.approx(one.score, abs=1e-4)


@everyone
def test_texts_that_are_alike_are_worth_the_same(name):
    alike = {"stories": SOURCES["stories"], "sums": SOURCES["stories"]}
    scores = torch.tensor([point.score for point in search(name, alike).points])
    assert torch.allclose(scores, scores[:1], atol=1e-4)
