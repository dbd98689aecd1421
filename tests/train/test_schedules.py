"""Schedules: ten steps written out, counts of a whole cycle, the same draw after a resume."""

from collections import Counter

import pytest

from polybit.core.plan import Plan
from polybit.core.precision import Precision
from polybit.core.runtime import PolybitError
from polybit.train.schedules import (
    Drawn,
    Fixed,
    Sandwich,
    choose,
    cyclic,
    cyclic_bits,
    every,
    in_turn,
    precision_range,
    preset_bits,
    widest_first,
)

PLANS = {"C": Plan.uniform("w3a4"), "A": Plan.uniform("w8a8"), "B": Plan.uniform("w4a4")}
LAYERS = ("x", "y")


def test_widest_first_by_weights_then_activations():
    assert widest_first(PLANS, LAYERS) == ("A", "B", "C")
    assert widest_first({"n": Plan.uniform("w4a4"), "w": Plan.uniform("w4a8")}, LAYERS) == ("w", "n")
    mixed = Plan(Precision(w=4), {"x": Precision(w=8)})
    assert preset_bits(mixed, LAYERS) == 6


def test_ten_steps_of_a_cycle():
    # T = 10, 4 to 8 bits: 4 + 2 (1 - cos(pi t / 10)) = 4, 4.098, 4.382, 4.824, 5.382, 6, 6.618, 7.176, 7.618, 7.902
    assert [cyclic_bits(t, 10, 4, 8) for t in range(10)] == [4, 4, 4, 5, 5, 6, 7, 7, 8, 8]
    assert cyclic_bits(10, 10, 4, 8) == 4  # drops, and rises again


def test_the_paper_s_counts_of_a_cycle_of_31():
    assert Counter(cyclic_bits(t, 31, 4, 8) for t in range(31)) == {4: 8, 5: 6, 6: 4, 7: 6, 8: 7}


def test_cycle_over_presets_takes_the_nearest_bits():
    schedule = cyclic(PLANS, LAYERS, steps=10, cycles=1)
    # bits 3 3 3 4 5 5 6 7 7 8 -> nearest of 8, 4, 3; 6 is as near to 8 as to 4 and goes to the wider
    bits = [cyclic_bits(t, 10, 3, 8) for t in range(10)]
    assert bits == [3, 3, 3, 4, 5, 6, 6, 7, 8, 8]
    names = [schedule(t, ("A", "B", "C"))[0] for t in range(10)]
    assert names == ["C", "C", "C", "B", "B", "A", "A", "A", "A", "A"]
    assert all(set(schedule(t, ("A", "B", "C"))) <= set(PLANS) for t in range(100))


def test_a_cycle_must_fit():
    with pytest.raises(PolybitError, match="5 cycles do not fit 10 steps: give 1 to 3"):
        cyclic(PLANS, LAYERS, steps=10, cycles=5)
    with pytest.raises(PolybitError, match="0 cycles"):
        cyclic(PLANS, LAYERS, steps=10, cycles=0)


def test_drawn_is_seeded_by_step():
    names = ("A", "B", "C")
    assert [Drawn(3)(t, names) for t in range(20)] == [Drawn(3)(t, names) for t in range(20)]
    assert Drawn(3)(7, names) == Drawn(3)(7, names) and [Drawn(3)(t, names) for t in range(20)] != [
        Drawn(4)(t, names) for t in range(20)
    ]
    counts = Counter(Drawn(0)(t, names)[0] for t in range(600))
    assert all(150 < counts[name] < 250 for name in names)
    assert Drawn(0, count=2)(0, names) in {("A", "B"), ("A", "C"), ("B", "C")}


def test_sandwich_keeps_both_ends_in_order():
    names = ("A", "B", "C", "D")
    for t in range(10):
        chosen = Sandwich(1)(t, names)
        assert chosen[0] == "A" and chosen[-1] == "D" and len(chosen) == 3 and chosen[1] in "BC"
    assert Sandwich()(0, ("A", "B")) == ("A", "B") and Sandwich()(0, ("A",)) == ("A",)
    assert Counter(Sandwich(0)(t, names)[1] for t in range(200)).keys() == {"B", "C"}


def test_fixed_and_all():
    assert every(5, ("A", "B")) == ("A", "B")
    assert Fixed("B")(0, ("A", "B")) == ("B",)
    with pytest.raises(PolybitError, match="choose one of A"):
        Fixed("Z")(0, ("A",))


def test_range_test_starts_where_training_makes_headway():
    assert precision_range({2: 0.01, 3: 0.25, 4: 0.8}, 1.0) == 3
    assert precision_range({2: 0.01, 3: 0.25, 4: 0.8}, 1.0, share=0.5) == 4
    with pytest.raises(PolybitError, match="no width"):
        precision_range({2: 0.0}, 1.0)
    with pytest.raises(PolybitError, match="raise the rate"):
        precision_range({2: 0.0}, 0.0)


def test_by_name():
    assert choose("fixed", PLANS, LAYERS, steps=10)(0, ("A", "B", "C")) == ("A",)
    assert choose("sandwich", PLANS, LAYERS, steps=10)(0, ("A", "B", "C")) == ("A", "B", "C")
    with pytest.raises(PolybitError, match="leaves a trained layer in float"):
        choose("random", {"A": Plan.uniform("float")}, LAYERS, steps=10)


def test_in_turn():
    """Ten steps written out."""
    taken = [in_turn(step, ("w4", "w3", "w2"))[0] for step in range(10)]
    assert taken == ["w4", "w3", "w2", "w4", "w3", "w2", "w4", "w3", "w2", "w4"]
