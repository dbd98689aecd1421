"""Mixture search: reference (energies of the mixed text itself), property (what each criterion must choose), errors."""

import pytest
import torch

from polybit.compress.mix_files import draw, whole_shares
from polybit.compress.stats import collect
from polybit.core.runtime import PolybitError
from polybit.measure.mixture import (
    Traces,
    best_mixture,
    blend,
    check_sources,
    collect_traces,
    effective_rank,
    pool,
    score_points,
    search_mixtures,
    simplex,
)
from polybit.nn.convert import targets
from tests.families import tiny_model


def text(seed: int, low: int, high: int) -> list[torch.Tensor]:
    """Two batches of three windows with ids of a range of their own."""
    return list(torch.randint(low, high, (6, 10), generator=torch.Generator().manual_seed(seed)).split(3))


SOURCES = {"stories": text(1, 3, 40), "sums": text(2, 40, 60), "talk": text(3, 60, 90)}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request):
    return tiny_model(request.param)


def test_energies_are_those_of_the_whole_model(model):
    """Twin: hooks on the whole model; a mixture's energies are those of the mixed text itself."""
    traces = collect_traces(model, SOURCES, targets(model))
    for row, batches in zip(traces.energy_SL, SOURCES.values(), strict=True):
        stats = collect(model, batches, targets(model))
        expected = torch.stack([stats[name].hessian_II.diagonal().double().sum() for name in traces.layers])
        assert torch.allclose(row, expected, rtol=1e-5)
    mixed = collect_traces(model, {"all": [b for batches in SOURCES.values() for b in batches]}, targets(model))
    assert torch.allclose(traces.energy_SL.mean(0), mixed.energy_SL[0], rtol=1e-5)


def test_inputs_that_several_layers_share_count_once(model):
    traces = collect_traces(model, SOURCES, targets(model))
    assert len(traces.layers) == 8  # per block: into attention, out of it, into the feed-forward, out of it


def test_erank_of_a_mixture_is_that_of_the_mixed_text(model):
    names = ["stories", "sums"]
    halves = {name: SOURCES[name] for name in names}
    traces = collect_traces(model, halves, targets(model), erank_at=torch.tensor([[0.5, 0.5]]))
    stats = collect(model, [*SOURCES["stories"], *SOURCES["sums"]], targets(model))
    expected = torch.stack([effective_rank(stats[name].hessian_II.double()) for name in traces.layers])
    assert torch.allclose(traces.erank_PL[0], expected, rtol=1e-3)


def test_effective_rank():
    assert float(effective_rank(torch.eye(7).double())) == pytest.approx(7)
    assert float(effective_rank(torch.ones(5, 5).double())) == pytest.approx(1, abs=1e-5)
    half = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])).double()
    assert float(effective_rank(blend([half, torch.zeros(4, 4)], torch.tensor([0.3, 0.7])))) == pytest.approx(2)


def test_literal_criterion_is_degenerate(model):
    """h is linear in α, so the cosine to the task pool is 1 at pure task text, and falls from there."""
    two = {name: SOURCES[name] for name in ("stories", "sums")}
    found = best_mixture(model, two, targets(model), general=["stories"], criterion="literal")
    assert found.weights == {"stories": 0.0, "sums": 1.0}
    along = [point.score for point in found.points]  # in order of α
    assert along == sorted(along, reverse=True) and along[0] == pytest.approx(1)
    three = best_mixture(model, SOURCES, targets(model), general=["stories"], criterion="literal", step=0.25)
    assert three.weights == {"stories": 0.0, "sums": 0.5, "talk": 0.5}


def synthetic(energy_SL) -> Traces:
    energy_SL = torch.tensor(energy_SL, dtype=torch.float64)
    layers = tuple(f"l{i}" for i in range(energy_SL.shape[1]))
    return Traces(("general", "task"), layers, energy_SL, torch.ones(len(layers)).double(), (10, 10))


def test_family_optimum_is_the_closed_form():
    """The target is the sum of unit vectors: α h_g + (1-α) h_t is parallel to it at α = |h_t| / (|h_g| + |h_t|)."""
    traces = synthetic([[3.0, 0.0, 1.0], [0.0, 1.0, 0.2]])
    points_PS = simplex(2, 0.01)
    points = score_points(traces, points_PS, ["general"], "family")
    general, task = (float(row.norm()) for row in traces.energy_SL)
    best = max(points, key=lambda p: p.score)
    assert best.weights[0] == pytest.approx(task / (general + task), abs=0.005)
    assert 0 < best.weights[0] < 1 and best.score == pytest.approx(1, abs=1e-4)


def test_one_massive_layer_does_not_decide_alone():
    """A layer a thousand times louder than the rest fixes the angle unless layers are normalised."""
    traces = synthetic([[1000.0, 3.0, 1.0], [1100.0, 1.0, 3.0]])
    spread = {}
    for normalise in ("size", "layer"):
        scores = [p.score for p in score_points(traces, simplex(2, 0.25), ["general"], "literal", normalise)]
        spread[normalise] = max(scores) - min(scores)
    assert spread["layer"] > 100 * spread["size"]


def test_held_out_family_moves_the_target():
    traces = synthetic([[1.0, 0.0], [0.0, 1.0]])
    wanted = synthetic([[3.0, 1.0], [3.0, 1.0]])
    best = max(score_points(traces, simplex(2), ["general"], "family", "size", wanted), key=lambda p: p.score)
    assert best.weights[0] == pytest.approx(0.75)


def test_aligned_diverse_pays_for_rank(model):
    """With a task of one repeated token, pure task text has collapsed Hessians and is not chosen."""
    dull = {"stories": SOURCES["stories"], "sums": [torch.full((3, 10), 50)]}
    found = best_mixture(model, dull, targets(model), general=["stories"], criterion="aligned-diverse", step=0.1)
    ratios = [point.erank_ratio for point in found.points]
    assert ratios[0] < 0.5 and ratios[-1] == pytest.approx(1, abs=1e-6)
    assert found.best.weights[0] > 0
    for point in found.points:
        assert point.score == pytest.approx(point.alignment + 0.5 * point.erank_ratio)


def test_record_is_plain_json(model):
    import json

    found = best_mixture(model, SOURCES, targets(model), general=["stories"])
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert len(record["curve"]) == 66 and record["best"] in record["curve"]
    assert sum(record["best"]["weights"].values()) == pytest.approx(1)


@pytest.mark.parametrize(("count", "step", "points"), [(2, 0.25, 5), (2, None, 21), (3, 0.5, 6), (4, 0.1, 286)])
def test_simplex(count, step, points):
    grid_PS = simplex(count, step)
    assert grid_PS.shape == (points, count)
    assert torch.allclose(grid_PS.sum(1), torch.ones(points).double()) and bool((grid_PS >= 0).all())
    assert len({tuple(row) for row in grid_PS.tolist()}) == points


def test_windows_are_drawn_by_share():
    windows = {"a": torch.zeros(20, 4).long(), "b": torch.ones(20, 4).long()}
    drawn = draw(windows, {"a": 0.25, "b": 0.75}, 16, seed=3)
    assert drawn.shape == (16, 4) and int(drawn[:, 0].sum()) == 12
    assert torch.equal(drawn, draw(windows, {"a": 0.25, "b": 0.75}, 16, seed=3))
    numbered = {"a": torch.arange(20)[:, None].repeat(1, 4)}
    assert len(set(draw(numbered, {"a": 1}, 20)[:, 0].tolist())) == 20  # none twice


def test_whole_shares_add_up():
    assert whole_shares([1, 1, 1], 10) == [4, 3, 3]
    assert whole_shares([0.05, 0.95], 4) == [0, 4]
    assert pool(("a", "b", "c"), ("a", "c")).tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"c": 1.0}, "cannot be drawn"),
        ({"a": -1.0, "b": 2.0}, "cannot be drawn"),
        ({"a": float("nan")}, "cannot be drawn"),
        ({"a": 0.0}, "cannot be drawn"),
        ({"a": 1.0, "b": 0.0}, "gives 3"),
    ],
)
def test_bad_mixtures(weights, words):
    with pytest.raises(PolybitError, match=words) as caught:
        draw({"a": torch.zeros(3, 4), "b": torch.zeros(9, 4)}, weights, 8)
    assert "\n" not in str(caught.value)


def test_bad_sources():
    with pytest.raises(PolybitError, match="at least one task"):
        check_sources({"a": [1]}, ["a"])
    with pytest.raises(PolybitError, match="none of them"):
        check_sources({"a": [1], "b": [1]}, ["c"])
    with pytest.raises(PolybitError, match="holds no text"):
        check_sources({"a": [1], "b": []}, ["a"])
    with pytest.raises(PolybitError, match="same length"):
        draw({"a": torch.zeros(3, 4), "b": torch.zeros(9, 5)}, {"a": 1.0, "b": 1.0}, 2)
    with pytest.raises(PolybitError, match="does not divide"):
        simplex(2, 0.3)


def test_rank_kept_is_the_most_aligned_that_keeps_the_rank(model):
    dull = {"stories": SOURCES["stories"], "sums": [torch.full((3, 10), 50)]}
    found = search_mixtures(
        model, dull, targets(model), general=["stories"], criteria=["rank-kept", "literal"], step=0.05
    )
    points = found["rank-kept"].points
    kept = [point for point in points if point.erank_ratio >= 0.9]
    assert found["rank-kept"].best == max(kept, key=lambda point: point.alignment)
    assert 0 < len(kept) < len(points) and found["literal"].best.weights == (0.0, 1.0)
    with pytest.raises(PolybitError, match="'odd'"):
        search_mixtures(model, dull, targets(model), general=["stories"], criteria=["odd"])
