"""Widths inside a layer: means are kept, the search finds what exhaustive search finds, the programme is exact."""

import itertools
import random

import pytest

from polybit.allocate.columns import base_width, block_lengths, ranked_offsets, search_ranked, spend
from polybit.core.runtime import PolybitError


def mean_of(widths, lengths):
    return sum(b * n for b, n in zip(widths, lengths, strict=True)) / sum(lengths)


def test_blocks_and_base():
    assert block_lengths(172, 32) == (32, 32, 32, 32, 32, 12)
    assert base_width(3.5) == 3 and base_width(4.0) == 4


def test_equal_counts_keep_the_mean():
    salience, lengths = [5.0, 1.0, 3.0, 2.0, 9.0, 100.0], block_lengths(172, 32)
    assert ranked_offsets(salience, lengths, 3.0, 0) == (0,) * 6
    assert ranked_offsets(salience, lengths, 3.0, 2) == (1, -1, 0, -1, 1, 0)  # the short block stays
    assert ranked_offsets(salience, lengths, 3.0, 3) is None


def test_fractional_mean_by_counts():
    salience, lengths = [4.0, 3.0, 2.0, 1.0], (32,) * 4
    assert ranked_offsets(salience, lengths, 3.5, 0) == (1, 1, 0, 0)
    assert ranked_offsets(salience, lengths, 3.5, 1) == (1, 1, 1, -1)
    assert ranked_offsets(salience, lengths, 3.25, 1) == (1, 1, 0, -1)
    for mean, raised in ((3.5, 0), (3.5, 1), (3.25, 1), (3.3, 0)):
        offsets = ranked_offsets(salience, lengths, mean, raised)
        assert mean_of([3 + o for o in offsets], lengths) <= mean


@pytest.mark.parametrize("mean", [3.0, 3.5])
def test_search_keeps_the_least_harm(mean):
    """Twin: every i tried by hand; equal widths are among them."""
    draw = random.Random(1)
    salience = [draw.random() for _ in range(9)]
    lengths = (16,) * 9
    harms = {}

    def harm(offsets):
        return harms.setdefault(offsets, draw.random())

    found = search_ranked(salience, lengths, mean, harm)
    every = [ranked_offsets(salience, lengths, mean, i) for i in range(9)]
    tried = [offsets for offsets in every if offsets is not None]
    assert set(harms) == set(tried) and found.harm == min(harms.values())
    assert harms[found.offsets] == found.harm and len(found.tried) == len(tried)


def test_long_searches_are_thinned():
    calls = []
    search_ranked(list(range(400)), (8,) * 400, 4.0, lambda o: calls.append(o) or 1.0, tries=8)
    assert 7 <= len(calls) <= 10


@pytest.mark.parametrize("seed", range(8))
def test_spend_is_exact(seed):
    """Twin: all combinations."""
    draw = random.Random(seed)
    lengths = (4, 4, 4, 4, 3)
    widths = (2, 3, 4)
    harms = [sorted((draw.random() for _ in widths), reverse=True) for _ in lengths]
    mean = draw.choice([2.0, 2.6, 3.0, 3.5, 4.0])
    got = spend(harms, widths, lengths, mean)
    assert mean_of(got, lengths) <= mean + 1e-9

    def total(choice):
        return sum(row[widths.index(b)] for row, b in zip(harms, choice, strict=True))

    allowed = (c for c in itertools.product(widths, repeat=5) if mean_of(c, lengths) <= mean + 1e-9)
    assert total(got) == pytest.approx(min(map(total, allowed)))


def test_spend_below_the_least_width():
    with pytest.raises(PolybitError, match="below the narrowest"):
        spend([[1.0, 0.5]], (3, 4), (8,), 2.5)
