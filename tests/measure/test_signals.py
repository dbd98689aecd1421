"""Ranking statistics: Kendall's tau against pairs counted one by one, intervals that contain, halves that agree."""

import itertools

import numpy as np
import pytest

from polybit.core.runtime import PolybitError
from polybit.measure.signals import Signal, agreement, kendall, split_half


def signal(kl_LWN, name="text"):
    """A signal of L layers with widths 3 and 4."""
    kl_LWN = np.asarray(kl_LWN, dtype=np.float64)
    names = tuple(f"l{i}" for i in range(len(kl_LWN)))
    return Signal(name, names, (3, 4), kl_LWN, kl_LWN * 0.5, np.full(kl_LWN.shape[-1], 4.0), (10,) * len(names))


def noisy(seed, layers=12, items=40, noise=0.1, truth_seed=0):
    """Harms that differ by layer plus noise per item."""
    truth_L = np.random.default_rng(truth_seed).permutation(layers) + 1.0
    kl = truth_L[:, None, None] * np.array([4.0, 1.0])[None, :, None]
    return signal(kl * (1 + noise * np.random.default_rng(seed).standard_normal((layers, 2, items))), f"s{seed}")


def test_kendall_counts_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 5, 9), rng.integers(0, 5, 9)
        same = other = ties_a = ties_b = 0
        for i, j in itertools.combinations(range(9), 2):
            sign = np.sign(a[i] - a[j]) * np.sign(b[i] - b[j])
            same += sign > 0
            other += sign < 0
            ties_a += a[i] == a[j]
            ties_b += b[i] == b[j]
        pairs = 36
        wanted = (same - other) / np.sqrt((pairs - ties_a) * (pairs - ties_b))
        assert kendall(a, b) == pytest.approx(wanted)
    assert kendall([1, 2, 3], [4, 5, 6]) == 1 and kendall([1, 2, 3], [3, 2, 1]) == -1
    assert kendall([1, 1], [1, 2]) == 0


def test_table_is_nats_per_token():
    s = signal([[[8.0, 4.0], [2.0, 2.0]]])
    assert s.table().nats == {"l0": {3: 12 / 8, 4: 4 / 8}}
    assert s.table("nll").nats["l0"][3] == 6 / 8
    row = noisy(1).estimates()["l0"][3]
    assert row.low < row.value < row.high and row.n == 40


def test_signals_of_the_same_layers_agree_and_are_reliable():
    found = agreement(noisy(1), noisy(2), width=3)
    assert found["tau"]["value"] > 0.9 and found["tau"]["low"] <= found["tau"]["value"] <= found["tau"]["high"]
    assert min(found["reliability"].values()) > 0.8


def test_noise_is_known_by_its_halves():
    lost = agreement(noisy(1, noise=60, items=8), noisy(2, noise=60, items=8))
    assert max(abs(v) for v in lost["reliability"].values()) < 0.5
    assert split_half(noisy(1, items=1)) is None


def test_unrelated_rankings_have_an_interval_around_zero():
    found = agreement(noisy(1, layers=30), noisy(2, layers=30, truth_seed=9))
    assert abs(found["tau"]["value"]) < 0.35 and min(found["reliability"].values()) > 0.8


def test_different_layers_are_refused():
    with pytest.raises(PolybitError, match="different layers"):
        agreement(noisy(1, layers=3), noisy(1, layers=4))
