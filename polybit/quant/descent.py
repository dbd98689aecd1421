"""Choosing codes one column at a time: GPTQ's error compensation, then exact coordinate descent with refitted scales.

Everything here works on one or several widths at once (`Levels`): one matrix of codes, one error per width. Rows are
independent, so the work is done for all rows together, and for a few rows at a time when the layer is large. On a
processor and on a GPU a faster search (`quant.compiled`) does the same; what is written here says what that is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from polybit.kernels import search
from polybit.quant import compiled
from polybit.quant.fit import FitFreedom, fit_group
from polybit.quant.levels import Choice, Levels
from polybit.quant.problem import Problem, row_chunks

BLOCK = 128  # columns between two updates of everything to their right
# numbers up to which gradients are kept from one walk to the next instead of being made again
CARRIED, CARRIED_ON_GPU = 1 << 28, 1 << 29


@dataclass(frozen=True, slots=True)
class Walked:
    """Where a walk of coordinate descent starts or ends: codes [O, I], what they mean, and the gradient E_b H there,
    [B, O, I], where it is known."""

    codes_OI: Tensor
    levels: Levels
    gradient_BOI: Tensor | None = None


def compensate(problem: Problem, factor_II: Tensor, levels: Levels, order_I: Tensor | None = None) -> Tensor:
    """GPTQ (arXiv 2210.17323, algorithm 1): quantize a column, move its error to the columns not yet quantized.

    factor_II is `inverse_factor` of the Hessian, in the order of the columns `order_I` (None: from left to right);
    groups and their scales stay where they are whatever the order. With several widths every width keeps its own
    compensated copy of the weight, and the code least bad for all of them together is taken. Returns codes, int64.
    """
    return compensate_and_weigh(problem, factor_II, levels, order_I)[0]


def compensate_and_weigh(
    problem: Problem, factor_II: Tensor, levels: Levels, order_I: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`compensate`, and tr(E_b H E_bᵀ) of every width and row, [B, O]: the sum of the squared errors it moved."""
    rows, columns = problem.weight_OI.shape
    order_I = torch.arange(columns, device=factor_II.device) if order_I is None else order_I
    if search.usable(problem.weight_OI):
        return compiled.compensate(problem, factor_II, levels, order_I)
    codes_OI = torch.empty(rows, columns, dtype=torch.long, device=factor_II.device)
    loss_BO = problem.weight_OI.new_empty(len(levels.widths), rows)
    for part in row_chunks(rows, 2 * len(levels.widths) * columns):
        weight_OI = problem.weight_OI[part].index_select(1, order_I)
        codes_OI[part], loss_BO[:, part] = compensate_rows(weight_OI, factor_II, levels.rows(part), order_I)
    return codes_OI, loss_BO


def compensate_rows(weight_OI: Tensor, factor_II: Tensor, levels: Levels, order_I: Tensor) -> tuple[Tensor, Tensor]:
    """`compensate_and_weigh` for rows that fit in memory; weight and factor are in processing order, codes are not."""
    columns = weight_OI.shape[1]
    working_BOI = weight_OI.repeat(len(levels.widths), 1, 1)
    codes_OI = torch.empty_like(weight_OI, dtype=torch.long)
    groups = (order_I // levels.group_size if levels.group_size else torch.zeros_like(order_I)).tolist()
    choices: dict[int, Choice] = {}
    loss_BO = weight_OI.new_zeros(len(levels.widths), len(weight_OI))
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
        loss_BO += errors_BOi.square().sum(-1)
        working_BOI[:, :, end:] -= errors_BOi @ factor_II[start:end, end:]
    return torch.empty_like(codes_OI).index_copy_(1, order_I, codes_OI), loss_BO


def order_is_sorted(groups: list[int]) -> bool:
    """Whether each group is visited once, so that its tables can be dropped afterwards."""
    return all(a <= b for a, b in pairwise(groups))


def descend(
    problem: Problem, codes_OI: Tensor, levels: Levels, *, sweeps: int, freedom: FitFreedom | None, held: int = 0
) -> tuple[Tensor, Levels]:
    """`walk` from given codes; new codes and levels."""
    walked = walk(problem, Walked(codes_OI, levels), sweeps=sweeps, freedom=freedom, held=held)
    return walked.codes_OI, walked.levels


def walk(problem: Problem, at: Walked, *, sweeps: int, freedom: FitFreedom | None, held: int = 0) -> Walked:
    """Lower Σ_b λ_b tr(E_b H E_bᵀ) by `sweeps` passes over the columns; it never rises.

    In each pass every group first gets the scale (and what else `freedom` allows; None: nothing) that is best for its
    codes under H given the rest of the row, rounded to what is stored, then each of its columns the best code given
    everything else. `held` leading bits of every code stay as they are.
    """
    if search.usable(problem.weight_OI):
        fit = None
        if freedom is not None:
            fit = search.Fit(freedom.gain, freedom.zero, tuple(freedom.tables.get(b) for b in at.levels.widths))
        asked = search.Walk(sweeps, fit, held)
        found = Walked(*compiled.walk(problem, at.levels, at.codes_OI, at.gradient_BOI, asked))
        return found if carried(found) else Walked(found.codes_OI, found.levels)
    codes_OI, levels = at.codes_OI.clone(), at.levels.copy()
    gradient_BOI = problem.weight_OI.new_empty(len(levels.widths), *codes_OI.shape)
    for part in row_chunks(len(codes_OI), 3 * len(levels.widths) * codes_OI.shape[1]):
        known_BOI = None if at.gradient_BOI is None else at.gradient_BOI[:, part]
        # rows() gives views: the pass writes into `codes_OI`, `levels` and `gradient_BOI`
        gradient_BOI[:, part] = descend_rows(
            problem, part, (codes_OI[part], levels.rows(part), known_BOI), sweeps, freedom, held
        )
    found = Walked(codes_OI, levels, gradient_BOI)
    return found if carried(found) else Walked(codes_OI, levels)


def carried(walked: Walked) -> bool:
    """Whether the gradient is small enough to be kept."""
    most = CARRIED_ON_GPU if walked.codes_OI.is_cuda else CARRIED
    return walked.codes_OI.numel() * len(walked.levels.widths) <= most


def gradients(problem: Problem, codes_OI: Tensor, levels: Levels) -> Tensor:
    """E_b H at given codes, [B, O, I]."""
    if search.usable(problem.weight_OI):
        return compiled.walk(problem, levels, codes_OI, None, search.Walk(0))[2]
    return (levels.values(codes_OI) - problem.weight_OI) @ problem.hessian_II


def relevelled(problem: Problem, at: Walked, levels: Levels) -> Walked:
    """The same codes with other levels; only the gradients of widths whose values changed are made again."""
    known_BOI = at.gradient_BOI
    if known_BOI is None or not torch.equal(levels.offsets(), at.levels.offsets()):
        return Walked(at.codes_OI, levels)
    changed = [
        i for i, (new, old) in enumerate(zip(levels.steps(), at.levels.steps(), strict=True)) if (new != old).any()
    ]
    if not changed:
        return replace(at, levels=levels)
    known_BOI = known_BOI.clone()
    known_BOI[changed] = gradients(problem, at.codes_OI, levels.some(changed))
    return Walked(at.codes_OI, levels, known_BOI)


def descend_rows(
    problem: Problem,
    part: slice,
    at: tuple[Tensor, Levels, Tensor | None],
    sweeps: int,
    freedom: FitFreedom | None,
    held: int = 0,
) -> Tensor:
    """`walk` in place for rows that fit in memory; at: their codes, levels and gradient. Returns the new gradient."""
    weight_OI, hessian_II, (codes_OI, levels, gradient_BOI) = problem.weight_OI[part], problem.hessian_II, at
    columns = weight_OI.shape[1]
    size = levels.group_size or columns
    free = levels.bits - held if held else None
    values_BOI = levels.values(codes_OI)
    gradient_BOI = (values_BOI - weight_OI) @ hessian_II if gradient_BOI is None else gradient_BOI.clone()
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
    return gradient_BOI


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
