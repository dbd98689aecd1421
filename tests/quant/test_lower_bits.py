"""Trailing bits chosen again: reference (all codes tried for one column), property (leading bits stay, loss falls)."""

from dataclasses import replace

import pytest
import torch

from polybit.core.affine import Grid
from polybit.core.runtime import PolybitError
from polybit.quant.lower_bits import lower_bits
from polybit.quant.nested import nested
from polybit.quant.problem import layer_loss
from tests.quant.inputs import layer

WIDTHS = (8, 6, 4, 2)


def spoiled(rows=5, columns=48, seed=0):
    """A nested weight of which a quarter of the codes were moved into the next cell of 4 bits."""
    weight_OI, seen = layer(rows, columns, seed)
    q = nested(weight_OI, seen, Grid(8, 16, "group"), widths=WIDTHS, rounds=1, sweeps=1)
    moved_OI = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.25
    next_OI = ((q.codes_OI >> 4).int() + 1).clamp(max=15) << 4
    return weight_OI, seen, replace(q, codes_OI=torch.where(moved_OI, next_OI.to(torch.uint8), q.codes_OI))


@pytest.mark.parametrize("widths", [(8,), (8, 6)])
def test_leading_bits_stay_and_the_loss_falls(widths):
    weight_OI, seen, q = spoiled()
    found = lower_bits(weight_OI, seen, q, held=4, widths=widths)
    assert torch.equal(found.codes_OI >> 4, q.codes_OI >> 4)
    assert layer_loss(weight_OI, found, seen, 8) < 0.7 * layer_loss(weight_OI, q, seen, 8)
    assert layer_loss(weight_OI, found, seen, 4) == layer_loss(weight_OI, q, seen, 4)
    assert torch.equal(found.scale_OG, q.scale_OG) and found.ratios == q.ratios


def test_no_single_code_can_be_bettered():
    """At the end of the descent, trying every other code of a cell for any weight alone gains nothing."""
    weight_OI, seen, q = spoiled(rows=2, columns=20)
    found = lower_bits(weight_OI, seen, q, held=4)
    best = layer_loss(weight_OI, found, seen, 8)
    for row in range(2):
        for column in range(20):
            first = int(found.codes_OI[row, column]) >> 4 << 4
            for code in range(first, first + 16):
                other_OI = found.codes_OI.clone()
                other_OI[row, column] = code
                # the objective is damped, the loss reported here is not
                assert layer_loss(weight_OI, replace(found, codes_OI=other_OI), seen, 8) >= best * (1 - 1e-2)


def test_refusals():
    weight_OI, seen, q = spoiled()
    for held, widths in ((8, (8,)), (0, (8,)), (6, (8, 6))):
        with pytest.raises(PolybitError, match="hold fewer bits"):
            lower_bits(weight_OI, seen, q, held=held, widths=widths)
    with pytest.raises(PolybitError, match="column scale"):
        lower_bits(weight_OI, seen, replace(q, column_scale_I=torch.ones(48)), held=4)
