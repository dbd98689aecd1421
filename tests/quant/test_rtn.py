"""Round to nearest: reference (a literal twin in plain loops), property."""

import math

import pytest
import torch

from polybit.core.affine import Grid, QWeight, encode, scale_gain
from polybit.quant.problem import layer_loss
from polybit.quant.rtn import rtn
from polybit.quant.scales import search_scale
from tests.quant.inputs import layer


def half(value: float, gain: float) -> float:
    """A scale as it is stored."""
    return float(torch.tensor(value / gain, dtype=torch.float64).half()) * gain


def literal(weight, bits, size, zero_kind, importance=None, points=None):
    """Codes by the definition, one group at a time in Python floats; points None = min-max range."""
    top, middle = 2**bits - 1, (2**bits - 1) / 2
    weight = weight.double()
    # the gain of the layer: a power of two from the largest min-max scale
    spans = [
        (min(g.min().item(), 0), max(g.max().item(), 0)) for row in weight for g in row.split(size or weight.shape[1])
    ]
    widest = [(hi - lo) / top if zero_kind == "group" else max(-lo, hi) / middle for lo, hi in spans]
    gain = scale_gain(torch.tensor([half(w, scale_gain(torch.tensor(widest))) for w in widest]))
    lowest = 0.3 if bits < 4 else 0.5
    shrinks = [1.0] if points is None else [1 + (lowest - 1) * i / (points - 1) for i in range(points)]
    codes = []
    for row in weight:
        row_codes, column = [], 0
        for group in row.split(size or weight.shape[1]):
            lo, hi = min(group.min().item(), 0), max(group.max().item(), 0)
            best, best_codes = math.inf, None
            for f in shrinks:
                if zero_kind == "group":
                    s = half((hi - lo) * f / top, gain)
                    z = min(max(math.floor(-lo * f / s + 0.5), 0), top)
                else:
                    s, z = half(max(-lo, hi) * f / middle, gain), middle
                us = [min(max(math.floor(w / s + z + 0.5), 0), top) for w in group.tolist()]
                error = sum(
                    ((u - z) * s - w) ** 2 * (1.0 if importance is None else float(importance[column + i]))
                    for i, (u, w) in enumerate(zip(us, group.tolist(), strict=True))
                )
                if error < best:
                    best, best_codes = error, us
            row_codes += best_codes
            column += len(group)
        codes.append(row_codes)
    return torch.tensor(codes, dtype=torch.uint8)


@pytest.mark.parametrize("zero", ["centre", "group"])
@pytest.mark.parametrize(
    ("bits", "size", "shape"), [(2, 16, (3, 37)), (4, 32, (5, 33)), (8, 0, (2, 19)), (3, 16, (1, 5))]
)
def test_equals_the_literal_definition(zero, bits, size, shape):
    weight_OI, _ = layer(*shape)
    assert torch.equal(
        rtn(weight_OI, None, Grid(bits, size, zero), search=False).codes_OI, literal(weight_OI, bits, size, zero)
    )


@pytest.mark.parametrize("zero", ["centre", "group"])
def test_search_equals_the_literal_search_and_its_refinement_helps(zero):
    weight_OI, seen = layer(6, 45)
    grid = Grid(3, 16, zero)
    importance_I = seen.hessian_II.diagonal().double() / seen.hessian_II.diagonal().mean()
    losses = []
    for refine in (0, 2):
        scale_OG, middle = search_scale(weight_OI.double(), grid, importance_I, refine=refine)
        codes_OI = encode(weight_OI, scale_OG, middle, 3, 16)
        error_OI = QWeight(codes_OI, scale_OG.float(), middle.float(), 3, 16).dequantize() - weight_OI
        losses.append(error_OI.double().square() @ importance_I)
        if not refine:
            assert torch.equal(codes_OI, literal(weight_OI, 3, 16, zero, importance_I, points=30))
    assert (losses[1] <= losses[0]).all()
    assert losses[1].sum() < 0.998 * losses[0].sum()


@pytest.mark.parametrize("zero", ["centre", "level", "group"])
def test_search_beats_min_max(zero):
    weight_OI, _ = layer(32, 128)
    for bits, gain in ((2, 0.7), (3, 0.9), (4, 0.98)):
        grid = Grid(bits, 32, zero)
        searched, plain = rtn(weight_OI, None, grid), rtn(weight_OI, None, grid, search=False)
        assert layer_loss(weight_OI, searched, None) < gain * layer_loss(weight_OI, plain, None)


def test_more_bits_never_more_error():
    weight_OI, _ = layer(16, 96)
    for zero in ("centre", "level", "group"):
        losses = [layer_loss(weight_OI, rtn(weight_OI, None, Grid(b, 32, zero)), None) for b in range(2, 9)]
        assert losses == sorted(losses, reverse=True)


def test_a_level_grid_holds_zero_exactly_and_uses_its_extra_level_on_either_side():
    positive = torch.tensor([[8.0, 1.0, 0.0, -1.0]])
    for weight_OI in (positive, -positive):
        q = rtn(weight_OI, None, Grid(4, 0, "level"))
        assert float(q.dequantize()[0, 2]) == 0.0
        assert torch.equal(q.dequantize(), weight_OI)
