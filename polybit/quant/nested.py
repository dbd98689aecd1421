"""Nested codes: one stored integer per weight of which every width reads its leading bits, good at all of them.

One row of eight weights, stored at 4 bits and read at 2. Rounding to nearest asks nothing of the leading bits; nested
codes give a little at 4 bits so that 2 bits are better, and shift the grid (its zero point) for both:

    >>> import torch
    >>> from polybit.quant.rtn import rtn
    >>> weight_OI = torch.tensor([[-1.0, -0.6, -0.3, 0.0, 0.1, 0.35, 0.7, 1.1]])
    >>> error = lambda q, width: round(float((q.dequantize(width) - weight_OI).square().sum()), 3)
    >>> plain = rtn(weight_OI, None, Grid(4, 0, "group"))
    >>> plain.codes_OI.tolist(), (plain.codes_OI >> 2).tolist()
    ([[0, 3, 5, 7, 8, 9, 12, 15]], [[0, 0, 1, 1, 2, 2, 3, 3]])
    >>> q = nested(weight_OI, None, Grid(4, 0, "group"), widths=(4, 2))
    >>> q.codes_OI.tolist(), (q.codes_OI >> 2).tolist()
    ([[1, 4, 6, 8, 9, 10, 13, 15]], [[0, 1, 1, 2, 2, 2, 3, 3]])
    >>> error(plain, 4), error(q, 4)
    (0.009, 0.012)
    >>> error(plain, 2), error(q, 2)
    (0.279, 0.224)

At 2 bits the four codes are also drawn apart a little, by one ratio (core/affine):

    >>> round(float(q.ratios[2]), 2)
    1.06
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from polybit.core.affine import Grid, QWeight, centre, expand_groups, scale_gain
from polybit.core.planes import ratio_levels, storable_ratio
from polybit.core.records import LayerStats
from polybit.core.runtime import PolybitError
from polybit.quant.descent import Walked, compensate, compensate_and_weigh, gradients, relevelled, walk
from polybit.quant.fit import FitFreedom, expand_around
from polybit.quant.levels import Levels, as_qweight
from polybit.quant.problem import Problem, inverse_factor, pose, row_chunks
from polybit.quant.scales import search_scale, settle
from polybit.quant.slices import start_levels

WIDTHS = (8, 6, 5, 4, 3, 2)
# 8 bits are nearly exact and can pay for the others: what they lose is invisible, what the others gain is not
EMPHASIS = {8: 0.05, 7: 0.3, 6: 0.8, 5: 1.1, 4: 1.5, 3: 1.3, 2: 0.6}
COARSE_EMPHASIS = {
    8: 0.05,
    7: 0.3,
    6: 0.95,
    5: 1.15,
    4: 1.55,
    3: 1.9,
    2: 2.6,
}  # groups of 64 and more cost 3 and 2 bits
LAST = 0.96  # a round that leaves more than this of the loss is the last; uneven inputs ask for many
SAMPLED = 64  # rows on which that is judged
EXTRA_BYTES = 0.05  # what the ratios may add to a file, as a share of its largest width alone


def nested(
    weight_OI: Tensor,
    stats: LayerStats | None,
    grid: Grid,
    *,
    widths: Sequence[int] = WIDTHS,
    emphasis: Mapping[int, float] | None = None,
    tables: Sequence[int] | None = None,
    damp: float = 0.01,
    rounds: int = 6,
    sweeps: int = 2,
) -> QWeight:
    """Codes of `grid.bits` bits whose leading bits are good codes at every width of `widths`.

    The objective is Σ_b μ_b L_b / L_b(alone): the layer loss tr(E_b H E_bᵀ) at each width, over that of classic GPTQ
    made for this width alone, weighted by `emphasis` μ (width -> weight, 1 where not given; None: as tuned). Each
    width keeps its own error compensation while one code serves all (the joint form of GPTQ, arXiv 2210.17323; slicing
    as in MatQuant, arXiv 2502.06786); then up to `rounds` times `sweeps` passes of coordinate descent, with the shared
    scale and zero point of a group and its ratios fitted by least squares inside; then one more pass over all bits and
    one over those behind the leading 4, 5 and 6, which only wide widths read. `tables`: widths whose ratio is stored
    per group in 4 bits instead of once per layer; None: as many, from the narrowest, as add no more than 5 % to the
    file.
    Raises PolybitError for widths that do not fit the grid and for values that are not finite.
    """
    if grid.bits_G is not None:
        raise PolybitError(
            "nested codes are stored at one width and narrowed group by group when they are read: quantize without "
            "column widths and give them to the plan the checkpoint is read with"
        )
    widths = check_widths(widths, grid)
    if emphasis is None:
        emphasis = EMPHASIS if 0 < grid.group_size <= 32 else COARSE_EMPHASIS
    emphasis = {b: float(emphasis.get(b, 1.0)) for b in widths}
    problem = pose(weight_OI, stats, damp=damp)
    factor_II = inverse_factor(problem.hessian_II)
    if tables is None:
        tables = affordable_tables(widths, grid, weight_OI.shape)
    levels = weighted(start_levels(problem, grid, widths, emphasis), problem, factor_II, emphasis)
    levels, found = relevel(levels, levels.ratio_BOG, tables)
    at = Walked(compensate(problem, factor_II, levels), even_ratios(levels, tables))
    ratios = LayerRatios(problem, at.levels, tables)
    at, found = descend_in_rounds(problem, (at, found), ratios, grid.zero == "group", rounds, sweeps)
    at = ratios.fit(at)
    levels, stored = finish(at.levels, found)
    at = walk(problem, relevelled(problem, at, levels), sweeps=1, freedom=None)
    for held in sorted(widths[1:-2]):
        at = walk_below(problem, at, held)
    fixed = grid.fixed_zero()
    zero = at.levels.zero_OG if fixed is None else torch.tensor(fixed, device=at.codes_OI.device)
    return as_qweight(at.codes_OI, at.levels, problem.gain, zero, stored)


def descend_in_rounds(
    problem: Problem,
    start: tuple[Walked, dict[int, Tensor]],
    ratios: LayerRatios,
    zero: bool,
    rounds: int,
    sweeps: int,
) -> tuple[Walked, dict[int, Tensor]]:
    """Walks with refits until one gains little; where it ends, and the tables of ratios by width.

    start: where to start, and the tables there · zero: zero points are free.
    """
    at, found = start
    before = torch.inf
    for index in range(rounds):
        if index < 2:
            at = known(problem, at)
            levels, found = relevel(at.levels, wanted_ratios(problem, at), ratios.tables)
            at = relevelled(problem, at, levels)
        at = ratios.fit(at)
        freedom = FitFreedom(scale_gain(at.levels.scale_OG), zero, found)
        at = walk(problem, at, sweeps=sweeps, freedom=freedom)
        before, last = sampled_loss(problem, at), before
        if before > LAST * last:
            break
    return at, found


def weighted(levels: Levels, problem: Problem, factor_II: Tensor, emphasis: Mapping[int, float]) -> Levels:
    """The same with λ_b, the emphasis of each width over the loss it has when it is alone; they add up to 1."""
    alone = [loss_alone(problem, factor_II, Grid(b, levels.group_size)) for b in levels.widths]
    emphasis_B = levels.scale_OG.new_tensor([emphasis[b] / loss for b, loss in zip(levels.widths, alone, strict=True)])
    return replace(levels, emphasis_B=emphasis_B / emphasis_B.sum())


def check_widths(widths: Sequence[int], grid: Grid) -> tuple[int, ...]:
    """Distinct widths, widest first; the widest is what is stored."""
    ordered = tuple(sorted(set(widths), reverse=True))
    if not ordered or ordered[0] != grid.bits or ordered[-1] < 2:
        raise PolybitError(
            f"nested widths {list(widths)} do not fit codes of {grid.bits} bits: "
            f"give widths from 2 to {grid.bits} with {grid.bits} among them"
        )
    return ordered


def affordable_tables(widths: Sequence[int], grid: Grid, shape: Sequence[int]) -> tuple[int, ...]:
    """Widths, narrowest first, that may have a ratio per group within EXTRA_BYTES of the largest width's bytes."""
    rows, columns = shape
    narrower = sorted(widths)[:-1]
    spare = EXTRA_BYTES * grid.bits_per_weight(rows, columns) - 32 * len(narrower) / (rows * columns)
    each = 4 * grid.groups(columns) / columns + 32 / (rows * columns)
    return tuple(narrower[: max(0, int(spare / each))])


def loss_alone(problem: Problem, factor_II: Tensor, grid: Grid) -> float:
    """Layer loss of classic symmetric GPTQ made for one width; never quite zero, so that it can be divided by."""
    scale_OG, zero = search_scale(problem.weight_OI, grid, problem.importance_I)
    levels = Levels.single(grid.bits, grid.group_size, scale_OG, zero)
    loss = float(compensate_and_weigh(problem, factor_II, levels)[1].double().sum())
    size = float(problem.weight_OI.square().sum())
    return max(loss, 1e-9 * size, torch.finfo(torch.float32).tiny)


def even_ratios(levels: Levels, tables: Sequence[int]) -> Levels:
    """The same with ratio 1 wherever a width has one ratio for the whole layer, which is fitted later."""
    ratio_BOG = levels.ratio_BOG.clone()
    for index, width in enumerate(levels.widths):
        if width not in tables:
            ratio_BOG[index] = 1.0
    return replace(levels, ratio_BOG=ratio_BOG)


def walk_below(problem: Problem, at: Walked, held: int) -> Walked:
    """One pass over the bits behind the leading `held`, for the widths that read them; the others cost nothing."""
    at = known(problem, at)
    chosen = [i for i, b in enumerate(at.levels.widths) if b > held]
    assert at.gradient_BOI is not None
    start = Walked(at.codes_OI, at.levels.some(chosen), at.gradient_BOI[chosen])
    found = known(problem, walk(problem, start, sweeps=1, freedom=None, held=held))
    assert found.gradient_BOI is not None
    gradient_BOI = at.gradient_BOI.clone()
    gradient_BOI[chosen] = found.gradient_BOI
    return Walked(found.codes_OI, at.levels, gradient_BOI)


def sampled_loss(problem: Problem, at: Walked) -> float:
    """Σ_b λ_b tr(E_b H E_bᵀ) of some rows, evenly spread."""
    at = known(problem, at)
    assert at.gradient_BOI is not None
    part = slice(0, None, -(-len(at.codes_OI) // SAMPLED))
    error_BOI = at.levels.rows(part).values(at.codes_OI[part]) - problem.weight_OI[part]
    return float((at.levels.emphasis_B * (error_BOI * at.gradient_BOI[:, part]).sum((1, 2))).sum())


def known(problem: Problem, at: Walked) -> Walked:
    """The same with its gradient."""
    if at.gradient_BOI is not None:
        return at
    return replace(at, gradient_BOI=gradients(problem, at.codes_OI, at.levels))


def wanted_ratios(problem: Problem, at: Walked) -> Tensor:
    """Ratio of each group and width that is best given everything else, before rounding, [B, O, G]."""
    at = known(problem, at)
    levels, columns = at.levels, at.codes_OI.shape[1]
    assert at.gradient_BOI is not None
    size = levels.group_size or columns
    wanted_BOG = levels.ratio_BOG.clone()
    limit = 1 << (28 if at.codes_OI.is_cuda else 25)  # a GPU is given few and large steps
    for part in row_chunks(len(at.codes_OI), 3 * len(levels.widths) * columns, limit=limit):
        local = levels.rows(part)
        for group, first in enumerate(range(0, columns, size)):
            here = slice(first, min(first + size, columns))
            block_ii = problem.hessian_II[here, here]
            gradient_BOi = at.gradient_BOI[:, part, here]
            quadratic = expand_around(local, group, at.codes_OI[part, here], gradient_BOi, block_ii)
            offset_O = (1 << levels.bits) / 2 - 0.5 - local.zero_OG[:, group]
            wanted_BOG[:, part, group] = quadratic.ratio(local.scale_OG[:, group], offset_O)
    usable = torch.isfinite(wanted_BOG) & (wanted_BOG > 0.3) & (wanted_BOG < 2.5)
    return torch.where(usable, wanted_BOG, levels.ratio_BOG)


def relevel(levels: Levels, wanted_BOG: Tensor, tables: Sequence[int]) -> tuple[Levels, dict[int, Tensor]]:
    """Lay the 16 stored ratios of each width in `tables` over the wanted ones (1st to 99th percentile) and round."""
    ratio_BOG, found = levels.ratio_BOG.clone(), {}
    for index, width in enumerate(levels.widths):
        if width not in tables:
            continue
        wanted = wanted_BOG[index].flatten().sort().values
        low, high = float(wanted[int(0.01 * (len(wanted) - 1))]), float(wanted[int(0.99 * (len(wanted) - 1))])
        found[width] = ratio_levels(low, high).to(ratio_BOG)
        step = max(high - low, 1e-12) / (len(found[width]) - 1)
        place_OG = ((wanted_BOG[index] - low) / step).round().clamp(0, len(found[width]) - 1).long()
        ratio_BOG[index] = found[width][place_OG]
    return replace(levels, ratio_BOG=ratio_BOG), found


class LayerRatios:
    """The ratios of the widths that have one for the whole layer: the best under H, as 32-bit floats."""

    def __init__(self, problem: Problem, levels: Levels, tables: Sequence[int]) -> None:
        self.problem, self.tables = problem, tables
        self.free = [i for i, b in enumerate(levels.widths) if b not in tables and b != levels.bits]
        self.pushed_OI = problem.weight_OI @ problem.hessian_II if self.free else None
        columns = problem.weight_OI.shape[1]
        size = levels.group_size or columns
        self.sums_GI = torch.stack([problem.hessian_II[i : i + size].sum(0) for i in range(0, columns, size)])

    def fit(self, at: Walked) -> Walked:
        """The same codes with these ratios, and the gradient there.

        With steps S_b at ratio 1 and R the weight less the offsets, E_b = r_b S_b - R: the gradient tells S_b H.
        """
        if self.pushed_OI is None:
            return at
        at = known(self.problem, at)
        levels, columns = at.levels, at.codes_OI.shape[1]
        ratio_BOG, gradient_BOI = levels.ratio_BOG.clone(), at.gradient_BOI
        assert gradient_BOI is not None
        rest_OI = self.pushed_OI - levels.offsets() @ self.sums_GI
        for index in self.free:
            ratio = float(ratio_BOG[index, 0, 0])
            stride = 2.0 ** (levels.bits - levels.widths[index])
            scale_OI = expand_groups(levels.scale_OG * stride, columns, levels.group_size)
            prefix_OI = (at.codes_OI >> (levels.bits - levels.widths[index])).to(scale_OI) - centre(
                levels.widths[index]
            )
            step_OI = prefix_OI.mul_(scale_OI)
            above = float((step_OI * rest_OI).sum())
            pushed_OI = gradient_BOI[index] + rest_OI
            below = float((step_OI * pushed_OI).sum()) / ratio
            if below > 0 and 0.1 < above / below < 10:
                found = float(torch.tensor(above / below, dtype=torch.float32))
                ratio_BOG[index] = found
                gradient_BOI[index] = pushed_OI.mul_(found / ratio).sub_(rest_OI)
        return Walked(at.codes_OI, replace(levels, ratio_BOG=ratio_BOG), gradient_BOI)


def finish(levels: Levels, tables: Mapping[int, Tensor]) -> tuple[Levels, dict[int, Tensor]]:
    """Scales and ratios exactly as they will be stored, in the levels and as the `ratios` of a QWeight.

    A stored table spans the smallest to the largest ratio in use. Where no group uses an end of the table any more, the
    nearest one is moved there, so that the levels between stay the ones the codes were made for.
    """
    levels, ratios = levels.copy(), {}
    levels.scale_OG.copy_(settle(levels.scale_OG))
    for index, width in enumerate(levels.widths):
        if width == levels.bits:
            continue
        ratio_OG = levels.ratio_BOG[index]
        if width not in tables:
            ratios[width] = ratio_OG.flatten()[0].float()
            continue
        flat = ratio_OG.flatten()
        flat[flat.argmin()], flat[flat.argmax()] = tables[width][0], tables[width][-1]
        ratios[width] = storable_ratio(flat.view_as(ratio_OG).float())
        ratio_OG.copy_(ratios[width])
    return levels, ratios
