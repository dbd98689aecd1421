"""Improving a plan by measuring it: finds what additive harms hide, stays in the budget, never gets worse."""

import itertools
import random
from functools import partial

from polybit.allocate.knapsack import WidthChoice, solve
from polybit.allocate.swap import improve


def each(loss, plans):
    return [loss(plan) for plan in plans]


def problem(seed, layers=6):
    """Additive harms that mislead, and a true loss in which neighbouring layers make each other worse."""
    rng = random.Random(seed)
    choices = {
        f"l{i}": {w: WidthChoice(10 * w, 4.0 ** (3 - w) * rng.uniform(0.5, 1.5)) for w in (2, 3, 4)}
        for i in range(layers)
    }
    names = list(choices)

    def loss(plan):
        harms = [choices[n][plan[n]].harm for n in names]
        return sum(harms) + 3 * sum(a * b for a, b in itertools.pairwise(harms))

    return choices, [[n] for n in names], 10 * 3 * layers, loss


def test_never_worse_and_within_the_budget():
    better = 0
    for seed in range(10):
        choices, groups, budget, loss = problem(seed)
        start = solve(choices, groups, budget)
        found = improve(start, choices, groups, budget, partial(each, loss))
        assert sum(choices[n][w].bits for n, w in found.widths.items()) <= budget
        assert found.loss == loss(found.widths) <= loss(start)
        assert found.history == sorted(found.history, reverse=True)
        best = min(
            loss(dict(zip(choices, picks, strict=True)))
            for picks in itertools.product((2, 3, 4), repeat=len(choices))
            if sum(picks) * 10 <= budget
        )
        assert found.loss <= loss(start) - 0.5 * (loss(start) - best) + 1e-12, "half of the gap is closed"
        better += found.loss < loss(start)
    assert better >= 3


def test_groups_stay_together_and_evaluations_are_counted():
    choices, _, budget, loss = problem(3)
    names = list(choices)
    groups = [names[:3], names[3:]]
    calls = []

    def counted(plans):
        calls.extend(map(dict, plans))
        return each(loss, plans)

    found = improve(dict.fromkeys(names, 3), choices, groups, budget, counted, evaluations=4)
    assert all(len({plan[n] for n in group}) == 1 for plan in calls for group in groups)
    assert len(calls) == found.evaluations <= 4


def test_a_perfect_plan_is_left_alone():
    choices = {n: {2: WidthChoice(2, 1.0), 3: WidthChoice(3, 0.5)} for n in "ab"}
    found = improve({"a": 3, "b": 2}, choices, [["a"], ["b"]], 5, lambda plans: [0.0] * len(plans))
    assert found.widths == {"a": 3, "b": 2}
