"""The router: it learns what can be learnt, is judged where it was not fitted, and is checked when it is read."""

import json

import numpy as np
import pytest
import torch

from polybit.core.runtime import PolybitError
from polybit.serve.policy import AutoPolicy
from polybit.serve.router import FEATURES, PromptFeatures, checkpoint_digest, main_directions, read_router, write_router
from polybit.serve.router_fit import chosen, fit, judge, price_for

BITS = (8.0, 4.0, 2.0)
WIDTHS = ("w8", "w4", "w2")
BASIS = np.eye(8)[:, :3]


def prompts(count=300, seed=0, *, learnable=True):
    """Features, and harms that depend on one of them (or on nothing that can be seen)."""
    draw = np.random.default_rng(seed)
    features = draw.normal(size=(count, len(FEATURES) + 3))
    need = features[:, 2] if learnable else draw.normal(size=count)
    harms = np.exp(np.array([-8.0, -4.0, -1.0]) + np.outer(need, [0.2, 1.0, 1.0]) + 0.3 * draw.normal(size=(count, 3)))
    return features, harms


def test_it_beats_chance_where_there_is_something_to_learn_and_only_there():
    found = judge(*prompts(), BITS, 4.0)
    assert found["area"]["low"] > 0 and found["at_budget"]["difference"]["low"] > 0
    assert found["at_budget"]["oracle"] <= found["at_budget"]["router"] < found["at_budget"]["random"]
    nothing = judge(*prompts(learnable=False), BITS, 4.0)
    assert nothing["area"]["low"] < 0.1 * found["area"]["value"]
    # harms given to other prompts: what was learnt is no use
    features, harms = prompts()
    shuffled = judge(features, np.random.default_rng(1).permutation(harms), BITS, 4.0)
    assert shuffled["area"]["low"] <= 0


def test_the_budget_is_kept():
    features, harms = prompts()
    for budget in (2.0, 3.0, 4.5, 8.0):
        router = fit(features, harms, BITS, WIDTHS, BASIS, budget)
        told = router.harms(features)
        assert np.asarray(BITS)[chosen(told, np.asarray(BITS), router.price)].mean() <= budget + 1e-9
    assert price_for(harms, np.asarray(BITS), 8.0) == 0.0


def test_the_price_equals_a_search_over_all_of_them():
    _, harms = prompts(40)
    bits = np.asarray(BITS)
    found = price_for(harms, bits, 4.0)
    slow = min(p for p in np.geomspace(1e-9, 10, 20000) if bits[chosen(harms, bits, p)].mean() <= 4.0)
    assert found == pytest.approx(slow, rel=2e-3)


class Words:
    """A tokenizer of eight tokens."""

    def convert_ids_to_tokens(self, ids):
        return [["Ġthe", "7", "A", "!", "é", "ab", "Ġ12", "x"][i] for i in ids]

    def __len__(self):
        return 8


def test_features_are_means_over_the_prompt():
    embedding = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    features = PromptFeatures(Words(), embedding, main_directions(embedding, 3))
    one, two = features([1, 3]), features([1, 1, 3, 3])
    assert one[2:] == pytest.approx(two[2:]) and one[0] < two[0] and one[1] == 1 and two[1] == 0.5
    assert one[2:7].tolist() == [0.5, 0, 0.5, 0, 0] and features([0, 6])[2:7].tolist() == [0.5, 0, 0, 1, 0]


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "manifest.json").write_text('{"files": {}}')
    router = fit(*prompts(), BITS, WIDTHS, BASIS, 4.0)
    write_router(tmp_path / "router.json", router, checkpoint_digest(tmp_path))
    return tmp_path, router


def test_it_reads_back_and_decides_alike(directory):
    path, router = directory
    found = read_router(path, ("w8", "w6", "w4", "w2"), 8)
    features, _ = prompts(50, seed=3)
    assert [found.choose(row) for row in features] == [router.choose(row) for row in features]
    assert len({found.choose(row) for row in features}) > 1
    (path / "router.json").unlink()
    assert read_router(path, ("w8",), 8) is None


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("coefficients", [[1.0]], "shape"),
        ("price", float("1e999"), "Infinity|finite"),
        ("spread", [0.0] * 10, "positive"),
        ("widths", ["w9", "w4", "w2"], "w9"),
        ("version", 7, "version"),
        ("checkpoint", "other", "another checkpoint"),
        ("basis", [[1.0, 0.0, 0.0]] * 4, "embedding of 4"),
        ("mean", None, "no router"),
    ],
)
def test_a_damaged_or_foreign_one_is_refused(directory, key, value, said):
    path, _ = directory
    content = json.loads((path / "router.json").read_text())
    (path / "router.json").write_text(json.dumps(content | {key: value}))
    with pytest.raises(PolybitError, match=said):
        read_router(path, WIDTHS, 8)


def test_the_policy_gives_what_is_needed_and_less_under_load():
    policy = AutoPolicy(("w8", "w4", "w3", "w2"), 1.0, 2.0, needs=lambda tokens: "w3" if len(tokens) > 3 else "w6")
    assert policy.choose([1, 2], 0.5).precision == "w8" and policy.choose([1, 2], 0.5).by == "router"
    assert policy.choose([1] * 9, 0.5).precision == "w3"
    assert policy.choose([1, 2], 1.34).precision == "w4" and policy.choose([1, 2], 1.34).by == "load"
    assert policy.choose([1] * 9, 1.34).precision == "w3"  # already below what the load allows
    assert policy.choose([1, 2], 9.0).precision == "w2"
    assert AutoPolicy(("w8", "w4")).choose([1], 0.0).by == "default"
