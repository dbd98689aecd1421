"""A width per group: every quantizer against slow twins that know one width at a time, and against plain grids."""

import pytest
import torch

from polybit.core.affine import Grid, expand_groups, zero_points
from polybit.core.runtime import PolybitError
from polybit.quant.gptq import gptq
from polybit.quant.problem import layer_loss, pose
from polybit.quant.rounding import Bank, Tuning, rounding
from polybit.quant.scales import search_scale
from polybit.quant.table import QUANTIZERS
from tests.quant.inputs import layer

BITS_G = (2, 5, 3, 1, 4)
SIZE, COLUMNS = 16, 75  # the last group is shorter
ZEROS = ["centre", "level", "group"]


def ragged(zero: str) -> Grid:
    return Grid(4, SIZE, zero).with_widths(BITS_G)  # type: ignore[arg-type]


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_rounding_methods_treat_every_group_as_if_alone(method, zero):
    """Twin: each group quantized by itself on a plain grid of its width; groups of these methods are independent."""
    weight_OI, _ = layer(7, COLUMNS)
    got = QUANTIZERS[method](weight_OI, None, ragged(zero)).dequantize()
    for group, bits in enumerate(BITS_G):
        here = slice(group * SIZE, min((group + 1) * SIZE, COLUMNS))
        if bits > 1:
            alone = QUANTIZERS[method](weight_OI[:, here].contiguous(), None, Grid(bits, SIZE, zero)).dequantize()
            assert torch.allclose(got[:, here], alone, rtol=2e-3, atol=1e-5)  # the layer's scale unit may differ


def literal_gptq(weight_OI, seen, grid):
    """Optimal brain quantization by the definition: the inverse Hessian of what is left is formed anew each time."""
    rows, columns = weight_OI.shape
    problem = pose(weight_OI, seen)
    scale_OG, zero = search_scale(problem.weight_OI, grid, problem.importance_I)
    zero_OG = zero_points(zero, grid.bits, grid.group_bits(columns)) * torch.ones_like(scale_OG)
    scale_OI, zero_OI = (expand_groups(x, columns, SIZE) for x in (scale_OG, zero_OG))
    weight, hessian = problem.weight_OI.double().clone(), problem.hessian_II.double()
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    for column in range(columns):
        inverse_row = torch.linalg.inv(hessian[column:, column:])[0]
        top = 2 ** BITS_G[column // SIZE] - 1
        for row in range(rows):
            s, z = scale_OI[row, column], zero_OI[row, column]
            code = torch.floor(weight[row, column] / s + z + 0.5).clamp(0, top)
            codes[row, column] = code.to(torch.uint8)
            weight[row, column:] -= (weight[row, column] - (code - z) * s) / inverse_row[0] * inverse_row
    return codes


@pytest.mark.parametrize("zero", ZEROS)
def test_gptq_equals_the_literal_definition(zero):
    weight_OI, seen = layer(4, COLUMNS)
    grid = ragged(zero)
    assert torch.equal(gptq(weight_OI, seen, grid, descent_sweeps=0).codes_OI, literal_gptq(weight_OI, seen, grid))


@pytest.mark.parametrize("zero", ZEROS)
@pytest.mark.parametrize("method", ["rtn", "hqq", "awq", "gptq"])
def test_codes_fit_their_widths_and_the_loss_lies_between_plain_grids(method, zero):
    weight_OI, seen = layer(24, COLUMNS)
    q = QUANTIZERS[method](weight_OI, seen, ragged(zero))
    assert q.bits_G.tolist() == list(BITS_G) and q.bits == max(BITS_G)
    largest_G = torch.stack([part.amax() for part in q.codes_OI.split(SIZE, dim=1)])
    assert (largest_G <= (1 << q.bits_G.long()) - 1).all()
    wide = QUANTIZERS[method](weight_OI, seen, Grid(6, SIZE, zero))
    narrow = QUANTIZERS[method](weight_OI, seen, Grid(2, SIZE, zero).with_widths((2, 2, 2, 1, 2)))
    losses = [layer_loss(weight_OI, x, seen) for x in (wide, q, narrow)]
    assert losses == sorted(losses)


@pytest.mark.parametrize("zero", ZEROS)
def test_descent_lowers_the_loss_of_ragged_codes(zero):
    weight_OI, seen = layer(24, COLUMNS)
    classic = layer_loss(weight_OI, gptq(weight_OI, seen, ragged(zero), descent_sweeps=0), seen)
    assert layer_loss(weight_OI, gptq(weight_OI, seen, ragged(zero)), seen) < 0.9 * classic


@pytest.mark.parametrize("zero", ZEROS)
def test_learned_rounding_holds_ragged_codes(zero):
    """The bank gives its start back bit for bit, and training stays inside every group's own range."""
    weight_OI, seen = layer(12, COLUMNS)
    start = gptq(weight_OI, seen, ragged(zero))
    bank = Bank({"w": start}, {"w": weight_OI})
    assert torch.equal(bank.values()["w"], start.dequantize())
    hard = bank.harden()["w"]
    assert torch.equal(hard.codes_OI, start.codes_OI) and torch.equal(hard.bits_G, start.bits_G)
    trained = rounding(weight_OI, seen, ragged(zero), tuning=Tuning(steps=40, lr=0.02))
    assert layer_loss(weight_OI, trained, seen) <= layer_loss(weight_OI, start, seen)
    assert (trained.codes_OI <= ((1 << trained.bits_G.long()) - 1).repeat_interleave(SIZE)[:COLUMNS]).all()


def test_nested_codes_have_one_stored_width():
    weight_OI, seen = layer(4, COLUMNS)
    with pytest.raises(PolybitError, match="without column widths"):
        QUANTIZERS["nested"](weight_OI, seen, ragged("centre"), widths=(5, 3))
