"""AWQ: reference (the search written out), paper (uneven inputs are where it helps), property."""

import pytest
import torch

from polybit.core.affine import Grid, encode, expand_groups
from polybit.core.planes import pack, unpack
from polybit.core.records import LayerStats
from polybit.quant.awq import awq, column_scale
from polybit.quant.problem import layer_loss
from polybit.quant.rtn import rtn
from polybit.quant.scales import search_scale
from tests.quant.inputs import layer, stats


def uneven(rows, columns, seed=0):
    """A layer some of whose inputs are far stronger than others."""
    weight_OI, _ = layer(rows, columns, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    strength_I = torch.exp(1.5 * torch.randn(columns, generator=generator))
    return weight_OI, stats(torch.randn(512, columns, generator=generator) * strength_I)


def literal(weight_OI, seen, grid, points):
    """Eq. 4-5 of the paper, every exponent in turn, output error from tokens' second moments by its definition."""
    weight = weight_OI.double() / 4.0  # the working unit: a power of two just above the largest weight
    hessian = seen.hessian_II.double() / seen.hessian_II.double().diagonal().mean()
    best = (float("inf"), None, None)
    for step in range(points + 1):
        for tries in (8,):
            column = column_scale(seen.absmean_I.double(), step / points)
            scaled = weight / column
            scale, zero = search_scale(scaled, grid, hessian.diagonal() * column**2, points=tries)
            codes = encode(scaled, scale, zero, grid.bits, grid.group_size)
            spread = expand_groups(scale, weight.shape[1], grid.group_size)
            middle = expand_groups(zero * torch.ones_like(scale), weight.shape[1], grid.group_size)
            error = (codes.double() - middle) * spread * column - weight
            harm = sum(float(row @ hessian @ row) for row in error)
            if harm < best[0]:
                best = (harm, column, step)
    column = best[1]
    scale, zero = search_scale(weight / column, grid, hessian.diagonal() * column**2, points=30)
    return encode(weight / column, scale, zero, grid.bits, grid.group_size), column, best[2]


@pytest.mark.parametrize("zero", ["centre", "level", "group"])
def test_equals_the_search_written_out(zero):
    weight_OI, seen = uneven(5, 41)
    assert 2.0 <= weight_OI.abs().max() < 4.0
    grid = Grid(3, 16, zero)
    codes_OI, column_I, step = literal(weight_OI, seen, grid, points=10)
    assert step > 0
    q = awq(weight_OI, seen, grid, points=10)
    assert torch.equal(q.codes_OI, codes_OI)
    assert torch.equal(q.column_scale_I, column_I.float())


@pytest.mark.parametrize("bits", [3, 4])
def test_helps_where_inputs_are_uneven(bits):
    weight_OI, seen = uneven(48, 128)
    grid = Grid(bits, 32, "group")
    assert layer_loss(weight_OI, awq(weight_OI, seen, grid), seen) < 0.85 * layer_loss(
        weight_OI, rtn(weight_OI, seen, grid), seen
    )


def test_never_worse_than_rtn_and_rtn_without_statistics():
    grid = Grid(4, 32, "centre")
    for seed in range(4):
        weight_OI, seen = layer(8, 64, seed)
        awq_loss, rtn_loss = (layer_loss(weight_OI, f(weight_OI, seen, grid), seen) for f in (awq, rtn))
        assert awq_loss <= rtn_loss * (1 + 1e-6)
    plain = awq(weight_OI, None, grid)
    assert plain.column_scale_I is None
    assert torch.equal(plain.codes_OI, rtn(weight_OI, None, grid).codes_OI)


def test_column_scale_is_storable_and_counted():
    weight_OI, seen = uneven(16, 64)
    q = awq(weight_OI * 1e20, seen, Grid(4, 32, "centre"))
    assert q.column_scale_I is not None
    assert torch.equal(q.column_scale_I, q.column_scale_I.half().float())
    assert torch.equal(unpack(pack(q)).dequantize(), q.dequantize())
    assert q.bits_per_weight() == pytest.approx(4 + 16 / 32 + 16 / 16)


def test_extreme_statistics():
    weight_OI, seen = uneven(6, 45)
    dead = LayerStats(seen.hessian_II.clone(), seen.absmean_I.clone(), 3)
    dead.hessian_II[4], dead.hessian_II[:, 4], dead.absmean_I[4] = 0, 0, 0
    silent = LayerStats(torch.zeros(45, 45), torch.zeros(45), 3)
    for weight, given in ((weight_OI, dead), (weight_OI, silent), (weight_OI * 1e-30, seen), (weight_OI * 0, seen)):
        q = awq(weight, given, Grid(3, 32, "group"))
        assert torch.isfinite(q.dequantize()).all()
        assert torch.equal(unpack(pack(q)).dequantize(), q.dequantize())
