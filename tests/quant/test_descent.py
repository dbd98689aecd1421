"""Coordinate descent: reference (every code tried against the whole objective), property."""

import pytest
import torch

from polybit.core.affine import Grid
from polybit.quant.descent import compensate, descend
from polybit.quant.fit import FitFreedom
from polybit.quant.levels import Levels
from polybit.quant.problem import inverse_factor, pose
from polybit.quant.scales import search_scale
from tests.quant.inputs import layer


def start(rows, columns, grid):
    """A posed problem, the levels and codes of classic GPTQ."""
    problem = pose(*layer(rows, columns))
    scale_OG, zero = search_scale(problem.weight_OI, grid, problem.importance_I)
    levels = Levels.single(grid.bits, grid.group_size, scale_OG, zero)
    return problem, compensate(problem, inverse_factor(problem.hessian_II), levels), levels


def row_loss(problem, codes_OI, levels):
    """tr(E H Eᵀ), row by row."""
    error_OI = levels.values(codes_OI)[0] - problem.weight_OI
    return torch.einsum("oi,ij,oj->o", error_OI, problem.hessian_II, error_OI)


@pytest.mark.parametrize("grid", [Grid(2, 16, "centre"), Grid(3, 16, "group"), Grid(3, 0, "level")])
def test_a_sweep_equals_trying_every_code_of_every_column(grid):
    problem, codes_OI, levels = start(3, 37, grid)
    fast_OI, _ = descend(problem, codes_OI, levels, sweeps=2, freedom=None)
    slow_OI = codes_OI.clone()
    for _ in range(2):
        for column in range(37):
            losses = []
            for code in range(1 << grid.bits):
                tried_OI = slow_OI.clone()
                tried_OI[:, column] = code
                losses.append(row_loss(problem, tried_OI, levels))
            slow_OI[:, column] = torch.stack(losses).argmin(0)
    assert (slow_OI != codes_OI).any()
    assert torch.equal(fast_OI, slow_OI)


def test_blocks_and_groups_wider_than_a_block_change_nothing():
    """A row of one group of 300 columns is done in blocks of 128: the gradient carried between them must be exact."""
    problem, codes_OI, levels = start(2, 300, Grid(3, 0, "group"))
    fast_OI, _ = descend(problem, codes_OI, levels, sweeps=1, freedom=None)
    for column in range(300):
        gradient_O = ((levels.values(codes_OI)[0] - problem.weight_OI) @ problem.hessian_II)[:, column]
        wanted_O = levels.values(codes_OI)[0][:, column] - gradient_O / problem.hessian_II[column, column]
        place_O = wanted_O / levels.scale_OG[:, 0] + levels.zero_OG[:, 0]
        codes_OI[:, column] = torch.floor(place_O + 0.5).clamp(0, 7).long()
    assert torch.equal(fast_OI, codes_OI)


def test_the_start_is_left_alone_and_every_row_gains():
    problem, codes_OI, levels = start(6, 80, Grid(3, 32, "group"))
    kept, kept_scale = codes_OI.clone(), levels.scale_OG.clone()
    before_O = row_loss(problem, codes_OI, levels)
    better_OI, better = descend(problem, codes_OI, levels, sweeps=3, freedom=FitFreedom(1.0, zero=True))
    assert torch.equal(codes_OI, kept)
    assert torch.equal(levels.scale_OG, kept_scale)
    assert (row_loss(problem, better_OI, better) < before_O).all()
    assert torch.equal(better.zero_OG, better.zero_OG.round().clamp(0, 7))
