"""What every schedule of the table promises: presets of the run in their order, a seed that decides, none forgotten."""

from collections import Counter

import pytest

from polybit.core.plan import Plan
from polybit.core.runtime import PolybitError
from polybit.train.schedules import choose
from polybit.train.table import SCHEDULES

PLANS = {"A": Plan.uniform("w8a8"), "B": Plan.uniform("w4a4"), "C": Plan.uniform("w3a4")}
NAMES = tuple(PLANS)
LAYERS = ("x", "y")
TEN = {  # ten steps written out, one word a step; what is drawn follows a law instead, below
    "all": "ABC ABC ABC ABC ABC ABC ABC ABC ABC ABC",
    "cyclic": "C C C B B A A A A A",
    "fixed": "A A A A A A A A A A",
}


def steps_of(name, count, seed=0, cycles=1, steps=None):
    schedule = choose(name, PLANS, LAYERS, steps=steps or count, cycles=cycles, seed=seed)
    return [schedule(step, NAMES) for step in range(count)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_presets_of_the_run_in_their_order(name):
    for chosen in steps_of(name, 60, cycles=3):
        assert chosen and list(chosen) == [preset for preset in NAMES if preset in chosen]
    assert SCHEDULES[name].summary and not SCHEDULES[name].summary.endswith(".")


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_seed_decides_and_the_step_alone(name):
    """A resumed run, which begins in the middle, chooses as the whole one did."""
    assert steps_of(name, 40, seed=3) == steps_of(name, 40, seed=3)
    schedule = choose(name, PLANS, LAYERS, steps=40, cycles=1, seed=3)
    assert [schedule(step, NAMES) for step in reversed(range(40))][::-1] == steps_of(name, 40, seed=3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_preset_is_forgotten(name):
    counts = Counter(preset for chosen in steps_of(name, 300, cycles=5) for preset in chosen)
    assert (set(counts) == set(NAMES)) == SCHEDULES[name].all_presets
    assert min(counts.values()) >= 20


@pytest.mark.parametrize("name", TEN)
def test_ten_steps_written_out(name):
    assert " ".join("".join(chosen) for chosen in steps_of(name, 10)) == TEN[name]


def test_what_is_drawn_follows_its_law():
    one = Counter(steps_of("random", 600))
    assert set(one) == {("A",), ("B",), ("C",)} and all(150 < count < 250 for count in one.values())
    assert set(steps_of("sandwich", 10)) == {NAMES}  # both ends and the one between
    assert steps_of("random", 20, seed=1) != steps_of("random", 20, seed=2)


@pytest.mark.parametrize("name", [name for name, part in SCHEDULES.items() if part.cycles])
def test_cycles_must_fit_the_run(name):
    with pytest.raises(PolybitError, match="5 cycles do not fit 10 steps"):
        steps_of(name, 10, cycles=5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_preset_is_every_schedule_s_only_choice(name):
    schedule = choose(name, {"A": PLANS["A"]}, LAYERS, steps=8, cycles=2, seed=0)
    assert [schedule(step, ("A",)) for step in range(8)] == [("A",)] * 8
