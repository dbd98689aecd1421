"""The knapsack: equal to trying everything, groups share a width, fast at full size, clear when impossible."""

import itertools
import random
import time

import pytest

from polybit.allocate.costs import clean, combine, falling
from polybit.allocate.groups import fused_groups
from polybit.allocate.knapsack import WidthChoice, solve
from polybit.core.records import CostTable
from polybit.core.runtime import PolybitError


def draw(rng, layers, widths):
    """Random layers: effective bits from size and width, harms that mostly fall with the width."""
    found = {}
    for at in range(layers):
        size = rng.randint(10, 500)
        found[f"l{at}"] = {w: WidthChoice(size * (w + 0.25), 2.0 ** (-2 * w) * rng.random() * size) for w in widths}
    return found


def try_everything(choices, groups, budget):
    """The least harm of all assignments within the budget."""
    best = float("inf")
    for picks in itertools.product(*(choices[group[0]] for group in groups)):
        bits = sum(choices[n][w].bits for group, w in zip(groups, picks, strict=True) for n in group)
        if bits <= budget:
            best = min(best, sum(choices[n][w].harm for group, w in zip(groups, picks, strict=True) for n in group))
    return best


@pytest.mark.parametrize("seed", range(12))
def test_equals_trying_everything(seed):
    rng = random.Random(seed)
    choices = draw(rng, 7, (2, 3, 4, 6))
    names = list(choices)
    groups = [names[:3], names[3:5], names[5:6], names[6:]] if seed % 2 else [[n] for n in names]
    low, high = (sum(row[w].bits for row in choices.values()) for w in (2, 6))
    budget = low + rng.random() * (high - low)
    plan = solve(choices, groups, budget)
    assert all(len({plan[n] for n in group}) == 1 for group in groups)
    assert sum(choices[n][w].bits for n, w in plan.items()) <= budget
    harm = sum(choices[n][w].harm for n, w in plan.items())
    assert harm == pytest.approx(try_everything(choices, groups, budget), rel=1e-7, abs=1e-12)


def test_many_layers_in_a_second(capfd):
    choices = draw(random.Random(0), 224, range(2, 9))
    budget = sum(row[2].bits for row in choices.values()) * 1.6
    solve(choices, [[n] for n in choices], budget)  # scipy is imported
    began = time.process_time()
    solve(choices, [[n] for n in choices], budget)
    assert time.process_time() - began < 1.0
    print("still heard")
    assert capfd.readouterr().out == "still heard\n"


def test_tiny_harms_are_not_taken_for_rounding():
    choices = {n: {2: WidthChoice(2, 3e-9 * (at + 1)), 4: WidthChoice(4, 0.0)} for at, n in enumerate("abc")}
    assert solve(choices, [["a"], ["b"], ["c"]], 8) == {"a": 2, "b": 2, "c": 4}


def test_of_equally_harmless_plans_the_smaller_one():
    choices = {n: {2: WidthChoice(2, 1.0), 4: WidthChoice(4, 1.0)} for n in "ab"}
    assert solve(choices, [["a"], ["b"]], 100) == {"a": 2, "b": 2}


def test_refuses_what_cannot_be():
    choices = {"a": {2: WidthChoice(2, 1.0)}, "b": {4: WidthChoice(4, 1.0)}}
    with pytest.raises(PolybitError, match="below 6"):
        solve(choices, [["a"], ["b"]], 5)
    with pytest.raises(PolybitError, match="--free-groups"):
        solve(choices, [["a", "b"]], 100)
    with pytest.raises(PolybitError, match="measured as nan"):
        solve({"a": {2: WidthChoice(2, float("nan"))}}, [["a"]], 5)


def test_fused_layers():
    names = ["m.0.attn.q_proj", "m.0.attn.k_proj", "m.0.attn.v_proj", "m.0.attn.o_proj", "m.0.mlp.gate_proj"]
    names += ["m.0.mlp.up_proj", "m.0.mlp.down_proj", "m.1.attn.q_proj", "m.0.experts.3.w1", "m.0.experts.3.w3"]
    names += ["m.0.experts.4.w1", "m.0.experts.3.w2"]
    groups = fused_groups(names)
    assert groups == [names[:3], names[3:4], names[4:6], names[6:7], names[7:8], names[8:10], names[10:11], names[11:]]
    assert fused_groups(names, free=True) == [[n] for n in names]


def test_falling_is_the_nearest_falling_sequence():
    assert falling([5, 3, 1]) == [5, 3, 1]
    assert falling([1, 3, 2]) == [2, 2, 2]
    rng = random.Random(1)
    for _ in range(20):
        values = [rng.randint(0, 5) for _ in range(4)]
        grid = [v / 12 for v in range(61)]
        fitted = falling(values)
        assert all(a >= b for a, b in itertools.pairwise(fitted))
        error = sum((a - b) ** 2 for a, b in zip(values, fitted, strict=True))
        some = random.Random(2).sample(grid, 12)
        for tried in itertools.combinations_with_replacement(sorted(some, reverse=True), 4):
            assert error <= sum((a - b) ** 2 for a, b in zip(values, tried, strict=True)) + 1e-9


def test_cleaning_and_adding_up():
    task = CostTable({"a": {2: 4.0, 3: -1.0}, "b": {2: 1.0, 3: 2.0}}, {"a": 1, "b": 1})
    general = CostTable({"a": {2: 0.0, 3: 0.0}, "b": {2: 10.0, 3: 5.0}}, {"a": 1, "b": 1})
    assert clean(task).nats == {"a": {2: 4.0, 3: 0.0}, "b": {2: 1.5, 3: 1.5}}
    assert combine(task, general, 1.0, normalize="nats").nats == clean(task).nats
    both = combine(task, general, 0.7).nats
    assert both["a"][2] == pytest.approx(0.7) and both["b"][2] == pytest.approx(0.7 * 1.5 / 4 + 0.3)
    with pytest.raises(PolybitError, match="beta"):
        combine(task, general, 1.5)
