"""Gradients of several widths put together."""

import pytest
import torch

from polybit.train.balance import Balance, combine, inverse_losses

WIDE, NARROW = [torch.tensor([0.0, 0.1]), None], [torch.tensor([10.0, 0.0]), torch.tensor([3.0])]


def test_a_sum_adds_weighted():
    first, second = combine([WIDE, NARROW], ("w4", "w2"), Balance("sum", {"w2": 0.5}))
    assert first.tolist() == pytest.approx([5.0, 0.1]) and second.tolist() == [1.5]


def test_equal_gradients_have_length_one_each():
    first, _ = combine([WIDE, [torch.tensor([10.0, 0.0]), None]], ("w4", "w2"), Balance("gradient"))
    assert first.tolist() == pytest.approx([1.0, 1.0])


def test_projection_takes_away_what_works_against_another():
    first, _ = combine([[torch.tensor([1.0, 0.0])], [torch.tensor([-1.0, 1.0])]], ("a", "b"), Balance("project")), None
    joined = first[0]
    assert float(joined @ torch.tensor([1.0, 0.0])) >= 0 and float(joined @ torch.tensor([-1.0, 1.0])) >= 0


def test_a_parameter_nobody_touches_stays_untouched():
    assert combine([[None], [None]], ("a", "b"), Balance())[0] is None


def test_inverse_losses_give_equal_shares():
    weights = inverse_losses({"w4": 0.02, "w2": 2.0})
    assert weights["w4"] * 0.02 == pytest.approx(weights["w2"] * 2.0)
    assert sum(weights.values()) / 2 == pytest.approx(1.0)
