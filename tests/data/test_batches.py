"""Batches: property – every row once, within budget; padding that can be undone."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polybit.core.runtime import PolybitError
from polybit.data.batches import buckets, pad

LENGTHS = st.lists(st.integers(1, 50), max_size=40)


@given(LENGTHS, st.integers(1, 200), st.none() | st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_buckets_keep_every_row_within_budget(lengths, tokens, rows):
    groups = buckets(lengths, tokens=tokens, rows=rows)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= tokens
        assert rows is None or len(group) <= rows
    longest = [max(lengths[i] for i in group) for group in groups]
    assert longest == sorted(longest, reverse=True)


def test_buckets_fill_up():
    assert [len(group) for group in buckets([5] * 10, tokens=20)] == [4, 4, 2]
    for wrong in ({"tokens": 0}, {"tokens": 5, "rows": 0}):
        with pytest.raises(PolybitError):
            buckets([1], **wrong)


@given(st.lists(st.lists(st.integers(0, 9), max_size=7), max_size=6), st.sampled_from(["left", "right"]))
@settings(max_examples=60, deadline=None)
def test_pad_can_be_undone(rows, side):
    ids_BT, mask_BT = pad(rows, 99, side=side)
    assert [ids[mask].tolist() for ids, mask in zip(ids_BT, mask_BT, strict=True)] == rows
    assert (ids_BT[~mask_BT] == 99).all()
    for row, mask in zip(rows, mask_BT, strict=True):
        edge = mask[-len(row) :] if side == "left" else mask[: len(row)]
        assert edge.all() or not row
