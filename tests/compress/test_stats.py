"""Sums over calibration inputs: reference (float64, plainly), property (an input that layers share is summed once)."""

import pytest
import torch

from polybit.compress.stats import CallSums, LatestInput, outer_product


@pytest.mark.parametrize("columns", [1, 63, 192, 193, 500])
def test_outer_product_is_symmetric_and_the_plain_one(columns):
    x_TI = torch.randn(70, columns, generator=torch.Generator().manual_seed(0))
    outer_II = outer_product(x_TI)
    assert torch.equal(outer_II, outer_II.T)
    torch.testing.assert_close(outer_II.double(), x_TI.double().T @ x_TI.double(), rtol=1e-4, atol=1e-4)


def test_sums_are_shared_only_while_the_input_is_the_very_same():
    x_TI, latest = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), LatestInput()
    first = latest.sums(x_TI)
    assert latest.sums(x_TI) is first
    assert latest.sums(x_TI.clone()) is not first
    again = latest.sums(x_TI)
    x_TI.mul_(2)
    written = latest.sums(x_TI)
    assert written is not again
    torch.testing.assert_close(written.outer_II, 4 * again.outer_II)
    torch.testing.assert_close(written.absolute_I, CallSums.of(x_TI).absolute_I)
