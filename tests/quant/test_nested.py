"""Nested codes: reference (literal twins of the joint choice, the joint compensation and the fit), property."""

from itertools import pairwise

import pytest
import torch

from polybit.core.affine import Grid, QWeight, centre
from polybit.core.planes import pack, unpack
from polybit.core.records import LayerStats
from polybit.core.runtime import PolybitError
from polybit.quant.descent import compensate, descend
from polybit.quant.fit import FitFreedom, fit_group
from polybit.quant.gptq import gptq
from polybit.quant.levels import Choice
from polybit.quant.nested import WIDTHS, nested
from polybit.quant.problem import inverse_factor, layer_loss, pose
from polybit.quant.slices import start_levels
from tests.quant.inputs import layer, stats

FAST = {"rounds": 1, "sweeps": 1}


def value(code, width, bits, s, z, r):
    """What a code means at a width, as core.affine defines it."""
    return s * (2 ** (bits - width) * r * ((code >> (bits - width)) - centre(width)) + centre(bits) - z)


def joint(rows=3, columns=37, seed=0, bits=8, widths=WIDTHS):
    """A posed problem, levels with uneven emphasis and ratios, for the reference tests."""
    weight_OI, seen = layer(rows, columns, seed)
    problem = pose(weight_OI, seen)
    levels = start_levels(problem, Grid(bits, 16, "group"), widths, dict.fromkeys(widths, 1.0))
    levels.emphasis_B.copy_(torch.tensor([4.0**b for b in widths]))
    return problem, levels


def test_choice_equals_trying_every_code():
    problem, levels = joint()
    target_BO = problem.weight_OI[:, 20] + 0.02 * torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).double()
    codes_O, value_BO = Choice(levels, 1)(target_BO)
    for row in range(3):
        s, z = levels.scale_OG[row, 1], levels.zero_OG[row, 1]

        def cost(u, row=row, s=s, z=z):
            return sum(
                levels.emphasis_B[i] * (value(u, b, 8, s, z, levels.ratio_BOG[i, row, 1]) - target_BO[i, row]) ** 2
                for i, b in enumerate(WIDTHS)
            )

        assert int(codes_O[row]) == min(range(256), key=cost)
        for i, b in enumerate(WIDTHS):
            expected = value(int(codes_O[row]), b, 8, s, z, levels.ratio_BOG[i, row, 1])
            assert float(value_BO[i, row]) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize(("bits", "widths"), [(8, WIDTHS), (4, (4, 3, 2)), (6, (6,))])
def test_joint_compensation_equals_the_literal_definition(bits, widths):
    """Each width has its own weights left to round; the inverse Hessian of the columns left is formed anew."""
    problem, levels = joint(2, 21, bits=bits, widths=widths)
    emphasis = levels.emphasis_B.tolist()
    left_B = [problem.weight_OI.clone() for _ in widths]
    codes_OI = torch.zeros(2, 21, dtype=torch.long)
    for k in range(21):
        inverse = torch.linalg.inv(problem.hessian_II[k:, k:])
        for row in range(2):
            s, z = float(levels.scale_OG[row, k // 16]), float(levels.zero_OG[row, k // 16])
            ratios = levels.ratio_BOG[:, row, k // 16].tolist()
            wanted = [float(left_OI[row, k]) for left_OI in left_B]
            costs = []
            for u in range(1 << bits):
                values = [value(u, b, bits, s, z, r) for b, r in zip(widths, ratios, strict=True)]
                terms = zip(emphasis, values, wanted, strict=True)
                costs.append(sum(weight * (v - w) ** 2 for weight, v, w in terms))
            code = min(range(1 << bits), key=costs.__getitem__)
            codes_OI[row, k] = code
            for i, b in enumerate(widths):
                error = wanted[i] - value(code, b, bits, s, z, ratios[i])
                left_B[i][row, k:] -= error / inverse[0, 0] * inverse[0]
    assert torch.equal(compensate(problem, inverse_factor(problem.hessian_II), levels), codes_OI)


def objective(problem, codes_OI, levels):
    """Σ_b λ_b tr(E_b H E_bᵀ)."""
    error_BOI = levels.values(codes_OI) - problem.weight_OI
    return float((levels.emphasis_B * ((error_BOI @ problem.hessian_II) * error_BOI).sum((1, 2))).sum())


def test_no_sweep_and_no_fit_raises_the_objective():
    problem, levels = joint(8, 53)
    codes_OI = compensate(problem, inverse_factor(problem.hessian_II), levels)
    tables = {b: torch.linspace(0.8, 1.1, 16, dtype=torch.float64) for b in (3, 2)}
    for i in (4, 5):  # start on the table
        levels.ratio_BOG[i] = tables[WIDTHS[i]][9]
    seen = [objective(problem, codes_OI, levels)]
    for freedom in (None, FitFreedom(1.0), FitFreedom(1.0, True), FitFreedom(1.0, True, tables), None):
        for _ in range(2):
            codes_OI, levels = descend(problem, codes_OI, levels, sweeps=1, freedom=freedom)
            seen.append(objective(problem, codes_OI, levels))
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(seen)), seen
    assert seen[-1] < 0.9 * seen[0]


def test_fit_finds_the_least_squares_scale_and_integer_zero():
    """Against least squares on explicit residuals, group by group, for one row."""
    problem, levels = joint(1, 32)
    codes_OI = compensate(problem, inverse_factor(problem.hessian_II), levels)
    gradient_BOI = (levels.values(codes_OI) - problem.weight_OI) @ problem.hessian_II
    fitted = levels.copy()
    fit_group(
        fitted, 0, codes_OI[:, :16], gradient_BOI[:, :, :16], problem.hessian_II[:16, :16], FitFreedom(1.0, zero=True)
    )
    best = objective(problem, codes_OI, fitted)
    for shift in (-2, -1, 0, 1, 2):
        for scale in torch.linspace(0.97, 1.03, 61).double() * fitted.scale_OG[0, 0]:
            other = fitted.copy()
            other.scale_OG[0, 0], other.zero_OG[0, 0] = scale, (fitted.zero_OG[0, 0] + shift).clamp(0, 255)
            # a 16-bit scale is within 2^-11 of any other, which costs less than this slack
            assert best <= objective(problem, codes_OI, other) * (1 + 1e-3)


@pytest.mark.parametrize("size", [32, 64, 128, 0])
def test_what_is_stored_is_within_five_per_cent_of_the_widest_alone(size):
    weight_OI, seen = layer(64, 172)
    grid = Grid(8, size, "group")
    q = nested(weight_OI, seen, grid, **FAST)
    assert q.bits_per_weight() <= 1.05 * grid.bits_per_weight(64, 172)
    planes = pack(q)
    for width in WIDTHS:
        assert torch.equal(unpack(planes, width).dequantize(width), q.dequantize(width))
    assert sum(ratio.ndim for ratio in q.ratios.values()) >= 2 * 2  # at least 3 and 2 bits have a table


@pytest.mark.parametrize("size", [32, 64])
def test_every_width_is_good_at_once(size):
    """Ratios of layer losses to classic symmetric GPTQ made for each width alone; slices of its 8-bit codes lose."""
    weight_OI, seen = layer(48, 128)
    q = nested(weight_OI, seen, Grid(8, size, "group"))
    sliced = gptq(weight_OI, seen, Grid(8, size, "centre"), descent_sweeps=0)
    bounds = {8: 3.0, 6: 1.15, 5: 1.15, 4: 1.2, 3: 1.25, 2: 1.5}  # noise is harder than the layers of a model
    for width, bound in bounds.items():
        alone = layer_loss(weight_OI, gptq(weight_OI, seen, Grid(width, size, "centre"), descent_sweeps=0), seen)
        assert layer_loss(weight_OI, q, seen, width) < bound * alone, width
        if width < 8:
            assert layer_loss(weight_OI, q, seen, width) < 0.85 * layer_loss(weight_OI, sliced, seen, width)


def test_one_width_is_at_least_as_good_as_gptq():
    weight_OI, seen = layer(24, 96)
    for zero in ("centre", "group"):
        alone = layer_loss(weight_OI, gptq(weight_OI, seen, Grid(8, 32, zero), descent_sweeps=0), seen)
        q = nested(weight_OI, seen, Grid(8, 32, zero), widths=(8,))
        assert not q.ratios
        assert layer_loss(weight_OI, q, seen) <= alone


def test_shared_centre_and_ratio_one_are_the_plain_layout():
    weight_OI, seen = layer(8, 64)
    q = nested(weight_OI, seen, Grid(8, 32, "centre"), **FAST)
    assert q.zero.ndim == 0
    plain = QWeight(q.codes_OI, q.scale_OG, q.zero, 8, 32, dict.fromkeys((6, 4), torch.tensor(1.0)))
    for width in (8, 6, 4):
        as_codes = (q.codes_OI >> (8 - width)).float() - centre(width)
        expected = as_codes * 2.0 ** (8 - width) * q.scale_OG.repeat_interleave(32, dim=1)
        assert torch.allclose(plain.dequantize(width), expected, rtol=1e-6, atol=0)


def test_emphasis_moves_the_quality_between_widths():
    weight_OI, seen = layer(32, 96)
    grid = Grid(8, 32, "group")
    even = nested(weight_OI, seen, grid, **FAST)
    for width in (4, 2):
        leaning = nested(weight_OI, seen, grid, emphasis={width: 10.0}, **FAST)
        assert layer_loss(weight_OI, leaning, seen, width) < layer_loss(weight_OI, even, seen, width)


def test_extreme_inputs_stay_sane():
    weight_OI, seen = layer(7, 45)
    dead = seen.hessian_II.clone()
    dead[5], dead[:, 5] = 0, 0
    constant = weight_OI.clone()
    constant[2], constant[3] = 0.0, 1.5
    cases = {
        "no statistics": (weight_OI, None),
        "dead column": (weight_OI, LayerStats(dead, seen.absmean_I, 9)),
        "one token": (weight_OI, stats(torch.randn(1, 45, generator=torch.Generator().manual_seed(1)))),
        "constant rows": (constant, seen),
        "all zero": (torch.zeros(3, 45), seen),
        "huge": (weight_OI * 1e30, seen),
        "tiny": (weight_OI * 1e-30, seen),
        "both": (weight_OI * torch.logspace(-30, 30, 7)[:, None], seen),
        "one row": (weight_OI[:1], seen),
        "one weight": (weight_OI[:1, :1], None),
    }
    for name, (weight, given) in cases.items():
        for grid in (Grid(8, 32, "group"), Grid(4, 0, "level")):
            q = nested(weight, given, grid, widths=[b for b in WIDTHS if b <= grid.bits], **FAST)
            assert torch.equal(unpack(pack(q)).dequantize(), q.dequantize()), name
            for width in q.ratios:
                error = q.dequantize(width).double() - weight.double()
                assert torch.isfinite(error).all(), name
                assert error.square().sum() <= 1.5 * weight.double().square().sum() + 1e-12, (name, width)


def test_same_input_same_codes_and_unfit_widths_are_refused():
    weight_OI, seen = layer(9, 64)
    first, second = (nested(weight_OI, seen, Grid(8, 32, "group"), **FAST) for _ in range(2))
    assert torch.equal(first.codes_OI, second.codes_OI)
    assert torch.equal(first.scale_OG, second.scale_OG)
    with pytest.raises(PolybitError, match="do not fit codes of 8 bits"):
        nested(weight_OI, seen, Grid(8, 32), widths=(6, 4))
