"""HQQ: reference (a literal twin in Python floats), property."""

import math

import pytest
import torch

from polybit.core.affine import Grid, scale_gain
from polybit.quant.hqq import hqq, shrink
from polybit.quant.rtn import rtn
from polybit.quant.scales import span_scale
from tests.quant.inputs import layer


def literal(weight_OI, grid, starts, norm=0.7, beta=10.0, kappa=1.01, iterations=20):
    """One group at a time: round, split the error, fit zero point and scale; the least mean absolute error is kept."""
    top, middle = 2**grid.bits - 1, (2**grid.bits - 1) / 2
    gain = scale_gain(span_scale(weight_OI.double(), grid)[0])
    half = lambda s: float(torch.tensor(s / gain, dtype=torch.float64).half()) * gain  # noqa: E731
    near = lambda x, top: min(max(math.floor(x + 0.5), 0), top)  # noqa: E731
    rows = []
    for row in weight_OI.double():
        codes = []
        for group in row.split(grid.group_size or len(row)):
            w = group.tolist()
            lo, hi = min(0, *w), max(0, *w)
            least, best = math.inf, None
            for start in starts:
                if grid.zero == "group":
                    s = half((hi - lo) * start / top)
                    z = near(-lo * start / s, top)
                else:
                    s, z = half(max(-lo, hi) * start / middle), middle
                b = beta
                for _ in range(iterations):
                    u = [near(x / s + z, top) for x in w]
                    e = [x / s - (c - z) for x, c in zip(w, u, strict=True)]
                    if sum(map(abs, e)) * s < least:
                        least, best = sum(map(abs, e)) * s, u
                    split = [math.copysign(max(abs(x) - max(abs(x), 1e-8) ** (norm - 1) / b, 0), x) for x in e]
                    rest = [x / s - y for x, y in zip(w, split, strict=True)]
                    if grid.zero == "group":
                        z = near(sum(c - r for c, r in zip(u, rest, strict=True)) / len(w), top)
                    up = sum((c - z) * r for c, r in zip(u, rest, strict=True))
                    down = sum((c - z) ** 2 for c in u)
                    s = half(s * (up / down if down and up / down > 0 else 1.0))
                    b *= kappa
            codes += best
        rows.append(codes)
    return torch.tensor(rows, dtype=torch.uint8)


@pytest.mark.parametrize("zero", ["centre", "group"])
@pytest.mark.parametrize(("bits", "starts"), [(2, (1.0, 0.85, 0.7, 0.55)), (4, (1.0, 0.85)), (8, (1.0,))])
def test_equals_the_literal_definition(zero, bits, starts):
    weight_OI, _ = layer(4, 45)
    grid = Grid(bits, 16, zero)
    assert torch.equal(hqq(weight_OI / 3, None, grid).codes_OI, literal(weight_OI / 3, grid, starts))


def test_shrink_is_a_proximal_operator():
    error = torch.tensor([0.05, -0.05, 5.0, -5.0])
    small, _, large, negative = shrink(error, 10.0, 0.7).tolist()
    assert small == 0.0
    assert 4.9 < large < 5.0
    assert negative == -large


@pytest.mark.parametrize("zero", ["centre", "level", "group"])
def test_lowers_the_absolute_error_of_heavy_tails(zero):
    """What the method is for: a few outliers may be wrong when all the others gain."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(32, 128, generator=generator)
    weight_OI = normal.sign() * normal.abs() ** 1.8
    for bits, gain in ((2, 0.9), (3, 0.95), (4, 0.99)):
        grid = Grid(bits, 32, zero)
        plain, fitted = rtn(weight_OI, None, grid, search=False).dequantize(), hqq(weight_OI, None, grid).dequantize()
        assert (fitted - weight_OI).abs().mean() < gain * (plain - weight_OI).abs().mean()


def test_ignores_statistics():
    weight_OI, seen = layer(7, 45)
    grid = Grid(3, 32, "group")
    assert torch.equal(hqq(weight_OI, seen, grid).codes_OI, hqq(weight_OI, None, grid).codes_OI)
