"""Timing by a clock we wind ourselves: medians, shares of the probe, ratios within rounds; constants kept and used."""

import json

import pytest

from polybit.core.runtime import PolybitError
from polybit.speed import machine
from polybit.speed.machine import Constants, keep, recall
from polybit.speed.timing import Job, Timed, paired_ratio, percentile, summarize, time_rounds


class Clock:
    """Time passes only when work says so; every second round everything is three times slower."""

    def __init__(self):
        self.now, self.calls = 0.0, 0

    def __call__(self):
        return self.now

    def work(self, seconds):
        def call(_):
            self.calls += 1
            self.now += seconds

        return call


def test_ratios_are_formed_within_rounds():
    clock, slow = Clock(), [1.0]

    def job(name, seconds):
        def call(_):
            clock.now += seconds * slow[0]

        return Job(name, "polybit", call, copies=2, size=100, unit=4)

    def probe():
        slow[0] = 4.0 - slow[0] if probe.count % 3 == 0 else slow[0]  # 1, 3, 1, 3 from round to round
        probe.count += 1
        return 200.0 / slow[0]

    probe.count = 1
    jobs = [job("a", 1.0), job("b", 2.0)]
    found = time_rounds(jobs, 4, probe, clock)
    assert paired_ratio(found, "a", "b") == {"median": 2.0, "p20": 2.0, "p80": 2.0}
    assert {round(s) for s in found["a"].seconds} == {1, 3}
    rows = {row["name"]: row for row in summarize(jobs, found)}
    assert rows["a"]["per_second"] == 4 / rows["a"]["seconds"]
    assert rows["b"]["p20"] <= rows["b"]["seconds"] <= rows["b"]["p80"]


def test_a_share_is_of_the_probes_beside_it():
    clock = Clock()
    job = Job("a", "polybit", clock.work(2.0), size=100)
    found = time_rounds([job], 3, lambda: 100.0, clock)
    assert found["a"].share == [0.5] * 3
    assert clock.calls == 4  # one unseen
    with pytest.raises(PolybitError, match="--rounds 0"):
        time_rounds([job], 0, lambda: 1.0, clock)


def test_percentiles_are_values_that_occurred():
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert (percentile(values, 0), percentile(values, 0.2), percentile(values, 0.5), percentile(values, 1)) == (
        1.0,
        2.0,
        3.0,
        5.0,
    )
    found = {"a": Timed([1.0, 1.0], [1, 1]), "b": Timed([1.0, 3.0], [1, 1])}
    assert paired_ratio(found, "b", "a")["median"] == pytest.approx((1 + 1 / 3) / 2)


def test_constants_come_back_for_this_machine_only(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYBIT_CACHE", str(tmp_path))
    assert recall(2) is None
    made = Constants(machine.processor_name(), 2, "2026-01-01", 1e10, {8: 1.0, 3: 0.5}, 1e-5)
    assert keep(made) == tmp_path / "machine.json"
    keep(Constants("another processor", 4, "2026-01-01", 1e10, {8: 1.0}, 1e-5))
    assert recall(2) == made and recall(4) is None and recall(1) is None
    for damage in ("{", "[]", json.dumps({"2": {"efficiency": {}}}), json.dumps({"2": {"efficiency": {"x": 1}}})):
        (tmp_path / "machine.json").write_text(damage)
        assert recall(2) is None


def test_the_prediction_adds_up():
    constants = Constants("p", 1, "d", 1e9, {8: 1.0, 4: 0.5}, 1e-3)
    seconds = constants.seconds_per_token(4, quantized=1e6, floats=2e6, calls=3, blocks=2, block_seconds=5e-3)
    assert seconds == pytest.approx(2e-3 + 2e-3 + 3e-3 + 10e-3)
    assert constants.seconds_per_token(3, quantized=1e6, floats=0, calls=0, blocks=0) == pytest.approx(2e-3)
