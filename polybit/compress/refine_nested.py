"""Learned rounding of nested codes, of a model or a block: the narrow widths of one code in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from polybit.compress.blocks import VisitedBlock
from polybit.compress.recipe import NARROW
from polybit.compress.refine import LEARNING, Teacher, taught
from polybit.compress.stats import collect
from polybit.core.affine import QWeight
from polybit.core.memory import keeping_freed
from polybit.core.records import LayerStats
from polybit.core.runtime import Advance, progress
from polybit.nn.convert import Target
from polybit.quant.lower_bits import lower_bits
from polybit.quant.nested_steps import REACH, Values, train_nested
from polybit.quant.rounding import LAST, Tuning, batch_order
from polybit.quant.steps import KeptState, untold

NESTED = Tuning(steps=260, lr=0.007, inside=0.4)
NESTED_BLOCK = Tuning(steps=200, lr=0.007, inside=0.4)
SLIGHT = 0.5  # of the loss of the widest learned width at the start: what INAUDIBLE is where losses are no nats
REACHES = (REACH, REACH / 3, REACH / 9)  # that are tried, until one is better than the start
ROWS = 2  # windows a step reads: half of what one width takes, for there are several
SAMPLE = 4  # batches on which the widths are compared before and after
INAUDIBLE = 5e-3  # nats per token; differences below it do not count when widths are compared
WORST = 3.0  # factor by which no width may lose, whatever the others gain


def finish_nested(
    model: nn.Module,
    batches: Sequence[Tensor],
    targets: Sequence[Target],
    start: Mapping[str, QWeight],
    *,
    widths: Sequence[int],
    tuning: Tuning = NESTED,
    kept: KeptState | None = None,
) -> dict[str, QWeight]:
    """`refine.finish_model` for nested codes: every width is to stay the float model, and all share one code.

    Narrow widths (up to NARROW) take turns with the loss of one width; each has latent weights of its own, whose codes
    stay inside the cells of the narrower ones (quant/nested_steps.py). What wide widths read beyond is then chosen for
    the least output error of every layer. Memory: recipe.finish_bytes a weight.
    kept: where the state lies between two runs of the same; progress is shown. Returns the start where the widths did
    not get better on the calibration windows, in the mean of their relative losses, or one of them much worse.
    """
    narrow, wide = [b for b in sorted(widths) if b <= NARROW], [b for b in widths if b > NARROW]
    if not narrow:
        return dict(start)  # wide widths are as good as their layers' optimum
    halves = [part for ids_BT in batches for part in ids_BT.split(ROWS)]
    teacher, weights, start = taught(model, halves, targets, start)
    order = batch_order(len(halves), tuning)

    def objective(values: Values, step: int) -> Tensor:
        return teacher.distance(values(narrow[step % len(narrow)]), order[step])

    with progress(LEARNING, tuning.steps + LAST) as told, keeping_freed():
        learned = train_nested(start, weights, objective, narrow, tuning, kept=kept, told=told)
        stats = collect(model, batches, teacher.whole.targets) if wide else {}
        codes = lambda reach: settled(learned(reach), weights, stats, narrow[-1], wide)  # noqa: E731
        found = first_better(start, codes, lambda codes: divergences(codes, widths, teacher), INAUDIBLE)
        told(LAST)
    return found


def refine_nested_block(
    block: VisitedBlock,
    start: Mapping[str, QWeight],
    stats: Mapping[str, LayerStats],
    *,
    widths: Sequence[int],
    tuning: Tuning = NESTED_BLOCK,
    told: Advance = untold,
) -> dict[str, QWeight]:
    """The same for one block against its float outputs, on the float path, which every width starts from.

    stats: of the block's layers; told: hears of the steps, and of what follows them as LAST more.
    """
    narrow, wide = [b for b in sorted(widths) if b <= NARROW], [b for b in widths if b > NARROW]
    if not narrow:
        return dict(start)
    order = batch_order(block.batches, tuning)

    def loss(weights: Mapping[str, Tensor], index: int) -> Tensor:
        return (block.forward(weights, index) - block.wanted(index)).square().mean()

    @torch.no_grad()
    def losses(codes: Mapping[str, QWeight]) -> dict[int, float]:
        sample = range(0, block.batches, max(1, block.batches // SAMPLE))
        dense = {b: {name: q.dequantize(min(b, q.bits)) for name, q in codes.items()} for b in widths}
        return {b: sum(float(loss(dense[b], i)) for i in sample) for b in widths}

    weights = block.weights()
    objective = lambda values, step: loss(values(narrow[step % len(narrow)]), order[step])  # noqa: E731
    learned = train_nested(start, weights, objective, narrow, tuning, told=told)
    codes = lambda reach: settled(learned(reach), weights, stats, narrow[-1], wide)  # noqa: E731
    found = first_better(start, codes, losses, SLIGHT * losses(start)[narrow[-1]])
    told(LAST)
    return found


def first_better(
    start: Mapping[str, QWeight],
    codes: Callable[[float], dict[str, QWeight]],
    losses: Callable[[Mapping[str, QWeight]], dict[int, float]],
    least: float,
) -> dict[str, QWeight]:
    """The learned codes of the largest reach that are better than the start, or the start.

    What wide widths pay grows with the square of the reach, what narrow ones gain hardly does.
    """
    before = losses(start)
    for reach in REACHES:
        found = codes(reach)
        if better(before, losses(found), least):
            return found
    return dict(start)


def settled(
    codes: Mapping[str, QWeight],
    weights: Mapping[str, Tensor],
    stats: Mapping[str, LayerStats],
    held: int,
    wide: Sequence[int],
) -> dict[str, QWeight]:
    """The codes with the bits behind `held` chosen for the least output error at the wide widths, if there are any."""
    if not wide:
        return dict(codes)
    return {name: lower_bits(weights[name], stats.get(name), q, held=held, widths=wide) for name, q in codes.items()}


def better(before: Mapping[int, float], after: Mapping[int, float], least: float) -> bool:
    """Whether the widths lost less, in the mean of what is left of their losses, and none much more.

    least: differences below it do not count
    """
    left = [max(after[b], least) / max(before[b], least) for b in before]
    return sum(left) < len(left) and max(left) < WORST


@torch.no_grad()
def divergences(codes: Mapping[str, QWeight], widths: Sequence[int], teacher: Teacher) -> dict[int, float]:
    """Mean KL of every width over a few batches, nats per token."""
    sample = range(0, len(teacher.batches), max(1, len(teacher.batches) // SAMPLE))
    found = {}
    for width in widths:
        dense = {name: q.dequantize(min(width, q.bits)) for name, q in codes.items()}
        found[width] = sum(float(teacher.divergence(dense, i)) for i in sample) / len(sample)
    return found
