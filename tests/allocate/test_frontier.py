"""Frontiers: the exact one against all choices, the others never better than it, every measured point accounted for."""

import random
from itertools import product

import pytest

from polybit.allocate.frontier import FrontierPoint, Option, cheapest_within, evolve, exact, frontier, greedy, price
from polybit.core.runtime import PolybitError

KEYS = ("w8a8", "w4a8", "w4a4", "w3a4")


def table(layers=5, seed=0):
    rng = random.Random(seed)
    found = {}
    for n in range(layers):
        size, weight = rng.choice((4, 8, 16)), rng.random()
        harms = sorted(weight * rng.random() for _ in KEYS)
        found[f"layer{n}"] = {
            key: Option(size * cost, harm) for key, cost, harm in zip(KEYS, (64, 32, 16, 12), harms, strict=True)
        }
    return found


def everything(t):
    return [price(t, dict(zip(t, keys, strict=True))) for keys in product(KEYS, repeat=len(t))]


def test_frontier_by_hand():
    points = [FrontierPoint({}, c, h) for c, h in ((1, 9), (2, 5), (2, 6), (3, 5), (4, 1), (5, 2))]
    assert [(p.cost, p.harm) for p in frontier(points)] == [(1, 9), (2, 5), (4, 1)]
    assert frontier([]) == []


@pytest.mark.parametrize("seed", range(5))
def test_exact_is_the_best_of_all_choices_within_every_budget(seed):
    pytest.importorskip("scipy")
    t = table(seed=seed)
    all_points = everything(t)
    low, high = min(p.cost for p in all_points), max(p.cost for p in all_points)
    found = exact(t, points=7)
    for step in range(7):
        budget = low + (high - low) * step / 6
        best = min(p.harm for p in all_points if p.cost <= budget * (1 + 1e-12))
        ours = min(p.harm for p in found if p.cost <= budget * (1 + 1e-12))
        assert ours == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_greedy_spans_both_ends_and_never_beats_exact(seed):
    t = table(seed=seed)
    true = frontier(everything(t))
    found = greedy(t)
    assert found[-1].harm == pytest.approx(true[-1].harm) and found[0].cost == pytest.approx(true[0].cost)
    for point in found:
        best = min(p.harm for p in true if p.cost <= point.cost * (1 + 1e-12))
        assert point.harm >= best - 1e-12


def test_evolution_is_seeded_keeps_its_start_and_finds_what_addition_misses():
    t = table(layers=4)
    start = greedy(t)

    def loss(choice):  # two layers that together harm nobody when both are narrow: harms do not add up
        narrow = [choice[name] == "w3a4" for name in list(t)[:2]]
        return price(t, choice).harm + (0.0 if all(narrow) else 0.5)

    found = evolve(t, loss, start=start, evaluations=60, seed=3)
    again = evolve(t, loss, start=start, evaluations=60, seed=3)
    assert [p.choice for p in found] == [p.choice for p in again] and len(found) <= 60
    assert all(p.harm == pytest.approx(loss(p.choice)) for p in found)
    best = frontier(found)
    for point in start:
        assert min(p.harm for p in best if p.cost <= point.cost) <= loss(point.choice)
    assert any(p.found_by == "evolved" for p in best)


def test_cheapest_within():
    points = [FrontierPoint({}, 1, 9), FrontierPoint({}, 2, 5), FrontierPoint({}, 3, 5)]
    assert cheapest_within(points, 6).cost == 2
    with pytest.raises(PolybitError, match="the least is 5"):
        cheapest_within(points, 1)


def test_empty_tables_are_refused():
    for empty in ({}, {"a": {}}):
        with pytest.raises(PolybitError, match="at least one layer"):
            greedy(empty)
