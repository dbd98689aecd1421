"""Salience and the loss by columns: literal definitions, and sums that must come out."""

import pytest
import torch

from polybit.core.affine import Grid
from polybit.quant.gptq import gptq
from polybit.quant.problem import pose
from polybit.quant.rtn import rtn
from polybit.quant.salience import block_losses, column_losses, column_salience, over_blocks
from tests.quant.inputs import layer


def test_salience_is_obs_by_definition():
    """Twin: [H⁻¹]_cc of what is left once the columns before c are fixed, from a fresh inverse each time."""
    weight_OI, seen = layer(5, 12)
    hessian = pose(weight_OI, seen).hessian_II
    spread = torch.stack([torch.linalg.inv(hessian[c:, c:])[0, 0] for c in range(12)])
    expected = pose(weight_OI, seen).weight_OI.square().sum(0) / spread
    assert torch.allclose(column_salience(weight_OI, seen), expected.float(), rtol=1e-4)


@pytest.mark.parametrize("quantizer", [rtn, gptq])
def test_column_losses_add_up_to_the_layer_loss(quantizer):
    weight_OI, seen = layer(9, 40)
    q = quantizer(weight_OI, seen, Grid(3, 16))
    problem = pose(weight_OI, seen)
    error = q.dequantize().double() / problem.gain - problem.weight_OI
    whole = float(((error @ problem.hessian_II) * error).sum())
    assert float(column_losses(weight_OI, q, seen).sum()) == pytest.approx(whole, rel=1e-5)
    blocks = block_losses(weight_OI, {3: q}, seen, 16)
    assert blocks.shape == (3, 1) and float(blocks.sum()) == pytest.approx(whole, rel=1e-5)


def test_classic_gptq_pays_for_each_column_alone():
    """In GPTQ a column's share is its own rounding error over U_cc squared: halving the step quarters it."""
    weight_OI, seen = layer(64, 32)
    shares = [column_losses(weight_OI, gptq(weight_OI, seen, Grid(b, 32), descent_sweeps=0), seen) for b in (4, 5)]
    assert 3 < float((shares[0] / shares[1]).median()) < 6


def test_over_blocks():
    assert over_blocks(torch.arange(5.0), 2).tolist() == [1.0, 5.0, 4.0]
