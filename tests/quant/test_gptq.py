"""GPTQ: reference (a twin straight from the paper), paper (its gain over rounding), property (extreme inputs)."""

from itertools import pairwise

import pytest
import torch

from polybit.core.affine import Grid, expand_groups
from polybit.core.planes import pack, unpack
from polybit.core.records import LayerStats
from polybit.quant.gptq import gptq
from polybit.quant.problem import inverse_factor, layer_loss, pose
from polybit.quant.rtn import rtn
from polybit.quant.scales import search_scale
from tests.quant.inputs import layer, stats


def literal(weight_OI, seen, grid, damp=0.01, order=None):
    """Optimal brain quantization as GPTQ does it, by the definition: after each column the inverse Hessian of the
    columns that are left is formed anew, and the error goes to them by eq. 2 of the paper. No Cholesky, no blocks."""
    rows, columns = weight_OI.shape
    problem = pose(weight_OI, seen, damp=damp)
    scale_OG, zero = search_scale(problem.weight_OI, grid, problem.importance_I)
    scale_OI = expand_groups(scale_OG, columns, grid.group_size)
    zero_OI = expand_groups(zero * torch.ones_like(scale_OG), columns, grid.group_size)
    hessian = seen.hessian_II.double() / seen.hessian_II.double().diagonal().mean()
    hessian = (hessian + hessian.T) / 2 + damp * torch.eye(columns, dtype=torch.float64)
    weight = problem.weight_OI.double().clone()
    codes = torch.zeros(rows, columns, dtype=torch.uint8)
    left = list(range(columns)) if order is None else list(order)
    while left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        column = left[0]
        for row in range(rows):
            s, z = scale_OI[row, column], zero_OI[row, column]
            code = torch.floor(weight[row, column] / s + z + 0.5).clamp(0, 2**grid.bits - 1)
            codes[row, column] = code.to(torch.uint8)
            error = (weight[row, column] - (code - z) * s) / inverse[0, 0]
            for place, other in enumerate(left):
                weight[row, other] -= error * inverse[0, place]
        left = left[1:]
    return codes


@pytest.mark.parametrize("zero", ["centre", "level", "group"])
@pytest.mark.parametrize(
    ("bits", "size", "shape"), [(2, 16, (3, 37)), (4, 32, (4, 33)), (8, 0, (2, 19)), (3, 16, (1, 5)), (4, 64, (2, 150))]
)
def test_equals_the_literal_definition(zero, bits, size, shape):
    weight_OI, seen = layer(*shape)
    grid = Grid(bits, size, zero)
    assert torch.equal(gptq(weight_OI, seen, grid, descent_sweeps=0).codes_OI, literal(weight_OI, seen, grid))


def test_activation_order_equals_the_literal_definition():
    weight_OI, seen = layer(3, 45)
    grid = Grid(3, 16, "group")
    order = torch.argsort(seen.hessian_II.diagonal(), descending=True, stable=True).tolist()
    got = gptq(weight_OI, seen, grid, descent_sweeps=0, act_order=True).codes_OI
    assert torch.equal(got, literal(weight_OI, seen, grid, order=order))


def relative_error(weight_OI, q, seen):
    """Output error over output energy."""
    return layer_loss(weight_OI, q, seen) / float(((weight_OI @ seen.hessian_II) * weight_OI).sum())


def test_classic_gptq_keeps_its_whole_gain():
    """A loop that forgets part of the compensation inside a block loses more than half of the gain over rounding and
    nobody notices: so the gain is pinned (3 bits, groups of 32, correlated inputs, min-max rounding = 1)."""
    weight_OI, seen = layer(64, 256)
    grid = Grid(3, 32, "centre")
    nearest = relative_error(weight_OI, rtn(weight_OI, seen, grid), seen)
    classic = relative_error(weight_OI, gptq(weight_OI, seen, grid, descent_sweeps=0), seen)
    best = relative_error(weight_OI, gptq(weight_OI, seen, grid), seen)
    assert classic < 0.63 * nearest
    assert best < 0.78 * classic


@pytest.mark.parametrize("zero", ["centre", "level", "group"])
def test_descent_never_raises_the_objective(zero):
    weight_OI, seen = layer(16, 80)
    problem = pose(weight_OI, seen)
    damped = LayerStats(problem.hessian_II, seen.absmean_I, seen.tokens)
    losses = [
        layer_loss(weight_OI, gptq(weight_OI, seen, Grid(3, 32, zero), descent_sweeps=n), damped) for n in range(6)
    ]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(losses)), losses
    assert losses[-1] < 0.9 * losses[0]


def test_identity_hessian_without_statistics():
    """Independent columns have nothing to pass on: classic GPTQ is then rounding to nearest."""
    weight_OI, _ = layer(8, 70)
    grid = Grid(4, 32, "group")
    assert torch.equal(gptq(weight_OI, None, grid, descent_sweeps=0).codes_OI, rtn(weight_OI, None, grid).codes_OI)


def extreme_layers():
    """Name, weight, statistics."""
    weight_OI, seen = layer(7, 45)
    dead = seen.hessian_II.clone()
    dead[5], dead[:, 5] = 0, 0
    constant = weight_OI.clone()
    constant[2], constant[3] = 0.0, 1.5
    one_token = stats(torch.randn(1, 45, generator=torch.Generator().manual_seed(1)))
    spread = weight_OI * torch.logspace(-30, 30, 7)[:, None]
    return {
        "dead column": (weight_OI, LayerStats(dead, seen.absmean_I, 9)),
        "never excited": (weight_OI, LayerStats(torch.zeros(45, 45), torch.zeros(45), 9)),
        "one token": (weight_OI, one_token),
        "zero and constant rows": (constant, seen),
        "all zero": (torch.zeros(4, 45), seen),
        "huge": (weight_OI * 1e30, seen),
        "tiny": (weight_OI * 1e-30, seen),
        "both": (spread, seen),
        "one row": (weight_OI[:1], seen),
        "one column": (weight_OI[:, :1], LayerStats(torch.ones(1, 1), torch.ones(1), 3)),
        "huge inputs": (weight_OI, LayerStats(seen.hessian_II * 1e30, seen.absmean_I * 1e15, 9)),
        "half precision": (weight_OI.bfloat16(), seen),
    }


@pytest.mark.parametrize("name", extreme_layers())
@pytest.mark.parametrize(
    "grid", [Grid(4, 32, "group"), Grid(2, 16, "centre"), Grid(8, 0, "group"), Grid(3, 64, "level")]
)
@pytest.mark.parametrize("sweeps", [0, 2])
def test_extreme_inputs_stay_sane(name, grid, sweeps):
    """Finite, storable, and no worse than answering zero."""
    weight_OI, seen = extreme_layers()[name]
    q = gptq(weight_OI, seen, grid, descent_sweeps=sweeps)
    restored = unpack(pack(q))
    assert torch.equal(restored.dequantize(), q.dequantize())
    assert torch.isfinite(q.dequantize()).all()
    size = weight_OI.double().square().sum()
    assert (q.dequantize().double() - weight_OI.double()).square().sum() <= size * 1.5 + 1e-12


def test_singular_hessian_is_damped_until_it_factors():
    singular = torch.ones(6, 6, dtype=torch.float64) - 1e-9 * torch.eye(6)
    upper = inverse_factor(singular)
    assert torch.isfinite(upper).all()
    assert torch.equal(upper, upper.triu())
