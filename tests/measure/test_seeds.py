"""Intervals over calibration seeds."""

import pytest

from polybit.measure.seeds import over_seeds


def test_student_interval():
    """Three values with mean 2 and standard deviation 1: 2 ± 4.303 / sqrt 3."""
    estimate = over_seeds([1.0, 2.0, 3.0])
    assert estimate.value == 2.0 and estimate.n == 3
    assert estimate.high - 2 == pytest.approx(2 - estimate.low) == pytest.approx(4.303 / 3**0.5, abs=1e-3)


def test_pairs_cancel_what_seeds_share():
    estimate = over_seeds([10.1, 20.1, 30.1], [10.0, 20.0, 30.0])
    assert estimate.value == pytest.approx(0.1) and estimate.high - estimate.low < 1e-6


def test_one_seed_has_no_interval():
    assert over_seeds([3.0]).to_json() == {"value": 3.0, "low": 3.0, "high": 3.0, "n": 1}
