"""Choosing codes one column at a time: GPTQ's error compensation, then exact coordinate descent with refitted scales.

Everything here works on one or several widths at once (`Levels`): one matrix of codes, one error per width. Rows are
independent, so the work is done for all rows together, and for a few rows at a time when the layer is large. On a
processor the compiled search (`quant.compiled`) does the same; what is written here says what that is.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from polybit.kernels import search
from polybit.quant import compiled
from polybit.quant.fit import FitFreedom, fit_group
from polybit.quant.levels import Choice, Levels
from polybit.quant.problem import Problem, row_chunks

BLOCK = 128  # columns between two updates of everything to their right


def compensate(problem: Problem, factor_II: Tensor, levels: Levels, order_I: Tensor | None = None) -> Tensor:
    """GPTQ (arXiv 2210.17323, algorithm 1): quantize a column, move its error to the columns not yet quantized.

    factor_II is `inverse_factor` of the Hessian, in the order of the columns `order_I` (None: from left to right);
    groups and their scales stay where they are whatever the order. With several widths every width keeps its own
    compensated copy of the weight, and the code least bad for all of them together is taken. Returns codes, int64.
    """
    rows, columns = problem.weight_OI.shape
    order_I = torch.arange(columns, device=factor_II.device) if order_I is None else order_I
    if search.usable(problem.weight_OI):
        return compiled.compensate(problem, factor_II, levels, order_I)
    codes_OI = torch.empty(rows, columns, dtype=torch.long, device=factor_II.device)
    for part in row_chunks(rows, 2 * len(levels.widths) * columns):
        weight_OI = problem.weight_OI[part].index_select(1, order_I)
        codes_OI[part] = compensate_rows(weight_OI, factor_II, levels.rows(part), order_I)
    return codes_OI


def compensate_rows(weight_OI: Tensor, factor_II: Tensor, levels: Levels, order_I: Tensor) -> Tensor:
    """`compensate` for rows that fit in memory; weight and factor are in processing order, the result is not."""
    columns = weight_OI.shape[1]
    working_BOI = weight_OI.repeat(len(levels.widths), 1, 1)
    codes_OI = torch.empty_like(weight_OI, dtype=torch.long)
    groups = (order_I // levels.group_size if levels.group_size else torch.zeros_like(order_I)).tolist()
    choices: dict[int, Choice] = {}
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block_BOi = working_BOI[:, :, start:end].contiguous()
        errors_BOi = torch.empty_like(block_BOi)
        inner_ii = factor_II[start:end, start:end]
        for j in range(end - start):
            group = groups[start + j]
            if group not in choices:
                if order_is_sorted(groups):
                    choices.clear()
                choices[group] = Choice(levels, group)
            target_BO = block_BOi[:, :, j]
            codes_O, value_BO = choices[group](target_BO)
            codes_OI[:, start + j] = codes_O
            error_BO = (target_BO - value_BO) / inner_ii[j, j]
            errors_BOi[:, :, j] = error_BO
            block_BOi[:, :, j + 1 :] -= error_BO[:, :, None] * inner_ii[j, j + 1 :]
        working_BOI[:, :, end:] -= errors_BOi @ factor_II[start:end, end:]
    return torch.empty_like(codes_OI).index_copy_(1, order_I, codes_OI)


def order_is_sorted(groups: list[int]) -> bool:
    """Whether each group is visited once, so that its tables can be dropped afterwards."""
    return all(a <= b for a, b in pairwise(groups))


def descend(
    problem: Problem, codes_OI: Tensor, levels: Levels, *, sweeps: int, freedom: FitFreedom | None, held: int = 0
) -> tuple[Tensor, Levels]:
    """Lower Σ_b λ_b tr(E_b H E_bᵀ) by `sweeps` passes over the columns; it never rises.

    In each pass every group first gets the scale (and what else `freedom` allows; None: nothing) that is best for its
    codes under H given the rest of the row, rounded to what is stored, then each of its columns the best code given
    everything else. `held` leading bits of every code stay as they are. Returns new codes and levels.
    """
    if search.usable(problem.weight_OI):
        return compiled.descend(problem, codes_OI, levels, sweeps=sweeps, freedom=freedom, held=held)
    codes_OI = codes_OI.clone()
    levels = levels.copy()
    for part in row_chunks(len(codes_OI), 3 * len(levels.widths) * codes_OI.shape[1]):
        # rows() gives views: the pass writes into `codes_OI` and `levels`
        descend_rows(
            problem.weight_OI[part], problem.hessian_II, codes_OI[part], levels.rows(part), sweeps, freedom, held
        )
    return codes_OI, levels


def descend_rows(
    weight_OI: Tensor,
    hessian_II: Tensor,
    codes_OI: Tensor,
    levels: Levels,
    sweeps: int,
    freedom: FitFreedom | None,
    held: int = 0,
) -> None:
    """`descend` in place for rows that fit in memory."""
    columns = weight_OI.shape[1]
    size = levels.group_size or columns
    free = levels.bits - held if held else None
    values_BOI = levels.values(codes_OI)
    gradient_BOI = (values_BOI - weight_OI) @ hessian_II
    for _ in range(sweeps):
        before_OI = codes_OI.clone()
        for group, first in enumerate(range(0, columns, size)):
            here = slice(first, min(first + size, columns))
            old_BOi = values_BOI[:, :, here].clone()
            if freedom is not None:
                fit_group(levels, group, codes_OI[:, here], gradient_BOI[:, :, here], hessian_II[here, here], freedom)
                values_BOI[:, :, here] = group_values(levels, group, codes_OI[:, here])
                gradient_BOI[:, :, here] += (values_BOI[:, :, here] - old_BOi) @ hessian_II[here, here]
            choice = Choice(levels, group)
            for start in range(here.start, here.stop, BLOCK):
                block = slice(start, min(start + BLOCK, here.stop))
                moved_BOi = descend_block(choice, hessian_II, block, codes_OI, values_BOI, gradient_BOI, free)
                gradient_BOI[:, :, here] += moved_BOi @ hessian_II[block, here]
            # inside the group the gradient was needed at once, elsewhere only now
            moved_BOi = values_BOI[:, :, here] - old_BOi
            for rest in (slice(0, here.start), slice(here.stop, columns)):
                gradient_BOI[:, :, rest] += moved_BOi @ hessian_II[here, rest]
        if freedom is None and torch.equal(before_OI, codes_OI):
            break


def descend_block(
    choice: Choice,
    hessian_II: Tensor,
    here: slice,
    codes_OI: Tensor,
    values_BOI: Tensor,
    gradient_BOI: Tensor,
    free: int | None = None,
) -> Tensor:
    """One exact coordinate step for each column of a block; returns how far the values moved, [B, O, block].

    free: how many trailing bits of a code may change (None: all).
    """
    old_BOi = values_BOI[:, :, here].clone()
    now_BOi = old_BOi.clone()
    slope_BOi = gradient_BOI[:, :, here].clone()
    inner_ii = hessian_II[here, here]
    for j in range(inner_ii.shape[0]):
        target_BO = now_BOi[:, :, j] - slope_BOi[:, :, j] / inner_ii[j, j]
        bounds = None if free is None else cell(codes_OI[:, here.start + j], free)
        codes_O, value_BO = choice(target_BO, bounds)
        slope_BOi += (value_BO - now_BOi[:, :, j])[:, :, None] * inner_ii[j]
        now_BOi[:, :, j] = value_BO
        codes_OI[:, here.start + j] = codes_O
    values_BOI[:, :, here] = now_BOi
    return now_BOi - old_BOi


def cell(codes_O: Tensor, free: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest code with the same bits before the last `free` ones."""
    low_O = codes_O.long() >> free << free
    return low_O, low_O + ((1 << free) - 1)


def group_values(levels: Levels, group: int, codes_Oi: Tensor) -> Tensor:
    """Values of the codes of one group, [B, O, i]."""
    step_BO = levels.steps()[:, :, group]
    return levels.prefixes(codes_Oi, group) * step_BO[:, :, None] + levels.offsets()[:, group, None]
