"""The compiled search: reference (against its twin in torch), on every instruction set this processor runs."""

import warnings

import pytest
import torch

from polybit.core.affine import Grid
from polybit.kernels import extensions, search
from polybit.quant.descent import compensate, descend
from polybit.quant.fit import FitFreedom
from polybit.quant.gptq import gptq
from polybit.quant.levels import Levels
from polybit.quant.nested import WIDTHS, nested
from polybit.quant.problem import Problem, inverse_factor, pose
from polybit.quant.scales import search_scale
from polybit.quant.slices import start_levels
from tests.quant.inputs import layer

pytestmark = pytest.mark.skipif(not search.instruction_sets(), reason="needs the compiled search")
ISAS = range(len(search.instruction_sets()))
KINDS = [torch.float64, torch.float32]
RAGGED = (1, 2, 4, 3, 2)
GRIDS = [  # rows, columns, grid: rows and columns that fill no vector, block or panel
    (1, 1, Grid(2, 32, "group")),
    (33, 100, Grid(3, 32, "group")),
    (20, 75, Grid(3, 0, "level")),
    (130, 64, Grid(4, 64, "centre")),
    (5, 300, Grid(2, 0, "group")),
    (17, 150, Grid(8, 128, "group")),
    (9, 75, Grid(4, 16, "group").with_widths(RAGGED)),
    (9, 75, Grid(4, 16, "level").with_widths(RAGGED)),
    (9, 75, Grid(4, 16, "centre").with_widths(RAGGED)),
]


def posed(rows, columns, dtype, device="cpu"):
    """A problem in working units of this type."""
    problem = pose(*layer(rows, columns, tokens=512))
    return Problem(problem.weight_OI.to(device, dtype), problem.hessian_II.to(device, dtype), problem.gain)


def loss(problem, codes_OI, levels):
    """Σ_b λ_b tr(E_b H E_bᵀ) in float64."""
    error_BOI = levels.values(codes_OI).double() - problem.weight_OI.double()
    return float((levels.emphasis_B * ((error_BOI @ problem.hessian_II.double()) * error_BOI).sum((1, 2))).sum())


def rounding_error(problem, grid, scale_OG, zero):
    """Squared error of the nearest codes, weighted by column."""
    levels = Levels.of(grid, scale_OG, zero, problem.weight_OI.shape[1])
    error_OI = levels.values(levels.encode(problem.weight_OI))[0] - problem.weight_OI
    return float((error_OI.square() * problem.importance_I).sum())


def assert_alike(dtype, *pairs):
    """All equal in float64; in float32 a rare tie may fall to the other side, after which a row goes its own way."""
    for slow, fast in pairs:
        equal = float((slow == fast).float().mean())
        assert equal == 1.0 if dtype == torch.float64 else equal >= 0.95, equal


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("rows", "columns", "grid"), GRIDS)
def test_scales_compensation_and_descent_are_the_twins(isa, dtype, rows, columns, grid):
    check_walks(isa, dtype, rows, columns, grid)


def check_walks(isa, dtype, rows, columns, grid, device="cpu"):
    """Scales, compensation in both orders, fitted and plain descent, by one way of the search and by the twins."""
    problem = posed(rows, columns, dtype, device)
    order_I = torch.argsort(problem.importance_I, descending=True)
    factor_II = inverse_factor(problem.hessian_II)
    turned_II = inverse_factor(problem.hessian_II[order_I][:, order_I])
    found = []
    for way in (None, isa):
        with search.using(way):
            scale_OG, zero = search_scale(problem.weight_OI, grid, problem.importance_I)
            start = found[0][0] if found else (scale_OG, zero)
            levels = Levels.of(grid, *start, columns)
            codes_OI = compensate(problem, factor_II, levels)
            freedom = FitFreedom(1.0, zero=grid.zero == "group")
            first_OI = found[0][1] if found else codes_OI
            fitted_OI, fitted = descend(problem, first_OI, levels, sweeps=2, freedom=freedom)
            moved_OI, _ = descend(problem, first_OI, levels, sweeps=3, freedom=None)
            found.append(
                (
                    (scale_OG, zero),
                    codes_OI,
                    compensate(problem, turned_II, levels, order_I),
                    fitted_OI,
                    moved_OI,
                    fitted,
                )
            )
    slow, fast = found
    assert slow[1].dtype == fast[1].dtype
    if dtype == torch.float64:
        assert torch.equal(slow[0][0], fast[0][0])
        assert torch.equal(slow[0][1], fast[0][1])
        assert torch.equal(slow[5].scale_OG, fast[5].scale_OG)
        assert torch.equal(slow[5].zero_OG, fast[5].zero_OG)
    else:  # scales may tie
        before, after = (rounding_error(problem, grid, *scales) for scales in (slow[0], fast[0]))
        assert after <= (1 + 1e-3) * before + 1e-9
    assert_alike(dtype, *zip(slow[1:5], fast[1:5], strict=True))
    assert loss(problem, fast[3], fast[5]) <= (1 + 1e-2) * loss(problem, slow[3], slow[5]) + 1e-9


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("widths", [WIDTHS, (8, 7, 6, 5, 4, 3, 2), (4, 3, 2), (8, 2), (8, 7), (3, 2)])
@pytest.mark.parametrize(("rows", "columns", "size", "zero"), [(37, 100, 32, "group"), (3, 150, 0, "level")])
def test_nested_codes_are_the_twins(isa, dtype, widths, rows, columns, size, zero):
    check_nested(isa, dtype, widths, rows, columns, size, zero)


def check_nested(isa, dtype, widths, rows, columns, size, zero, device="cpu"):
    """Where nested codes start, compensation, descent with ratios and with a bit held, by one way and by the twins."""
    problem = posed(rows, columns, dtype, device)
    factor_II = inverse_factor(problem.hessian_II)
    grid, emphasis = Grid(widths[0], size, zero), {b: 1.0 / b for b in widths}
    tables = {b: torch.linspace(0.8, 1.1, 16, dtype=dtype, device=device) for b in widths[1:][-2:]}
    found, levels = [], None
    for way in (None, isa):
        with search.using(way):
            started = start_levels(problem, grid, widths, emphasis)
            if levels is None:
                levels = started.copy()
                levels.emphasis_B.copy_(torch.tensor([4.0**b for b in widths]) / sum(4.0**b for b in widths))
                for index, b in enumerate(widths):
                    if b in tables:
                        levels.ratio_BOG[index] = tables[b][9]
            codes_OI = compensate(problem, factor_II, levels)
            first_OI = found[0][1] if found else codes_OI
            freedom = FitFreedom(1.0, zero == "group", tables)
            fitted_OI, fitted = descend(problem, first_OI, levels, sweeps=2, freedom=freedom)
            held_OI, _ = descend(problem, first_OI, levels, sweeps=2, freedom=None, held=1)
            assert torch.equal(held_OI >> (widths[0] - 1), first_OI >> (widths[0] - 1))
            found.append((started, codes_OI, fitted_OI, held_OI, fitted))
    slow, fast = found
    assert_alike(dtype, *zip(slow[1:4], fast[1:4], strict=True))
    if dtype == torch.float64:
        for before, after in ((slow[0], fast[0]), (slow[4], fast[4])):
            assert torch.equal(before.scale_OG, after.scale_OG)
            assert torch.equal(before.zero_OG, after.zero_OG)
            assert torch.allclose(before.ratio_BOG, after.ratio_BOG, rtol=0, atol=1e-12)
    assert loss(problem, fast[2], fast[4]) <= (1 + 1e-2) * loss(problem, slow[2], slow[4])


def test_number_of_threads_changes_nothing():
    weight_OI, seen = layer(70, 96)
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found.append(nested(weight_OI, seen, Grid(8, 32, "group"), rounds=1, sweeps=1))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(found[0].codes_OI, found[1].codes_OI)
    assert torch.equal(found[0].scale_OG, found[1].scale_OG)


def test_without_the_extension_the_twins_do_it_all_and_it_is_said_once(monkeypatch):
    weight_OI, seen = layer(6, 64)
    expected = gptq(weight_OI, seen, Grid(3, 32, "group"))
    monkeypatch.setitem(__import__("sys").modules, "polybit.kernels._search", None)
    monkeypatch.delattr("polybit.kernels._search", raising=False)
    search.library.cache_clear()
    extensions.missing.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="without its compiled kernels"):
            assert not search.usable(weight_OI)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = gptq(weight_OI, seen, Grid(3, 32, "group"))
    finally:
        search.library.cache_clear()
        extensions.missing.cache_clear()
    assert torch.equal(expected.codes_OI, found.codes_OI)
    assert torch.equal(expected.scale_OG, found.scale_OG)
