"""Learned rounding of nested codes, of a model or a block: the narrow widths of one code in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polybit.compress.blocks import VisitedBlock
from polybit.compress.recipe import NARROW
from polybit.compress.refine import LEARNING, taught
from polybit.compress.stats import collect
from polybit.core.affine import QWeight
from polybit.core.memory import keeping_freed
from polybit.core.records import LayerStats
from polybit.core.runtime import Advance, progress
from polybit.nn.convert import Target
from polybit.quant.lower_bits import lower_bits
from polybit.quant.nested_steps import REACH, train_nested
from polybit.quant.rounding import LAST, Loss, Tuning, batch_order
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
    kept: where the state lies between two runs of the same; progress is shown. Returns the codes of the largest of
    REACHES at which the widths got better on the calibration windows, in the mean of their relative losses and none
    of them much worse; the start where there is none.
    """
    halves = [part for ids_BT in batches for part in ids_BT.split(ROWS)]
    teacher, weights, start = taught(model, halves, targets, start)
    stats = lambda: collect(model, batches, teacher.whole.targets)  # noqa: E731
    losses = lambda codes: sampled(codes, widths, teacher.divergence, len(halves))  # noqa: E731
    learnt = Nested(start, weights, tuple(widths), teacher.distance, losses, stats)
    with progress(LEARNING, tuning.steps + LAST) as told, keeping_freed():
        return learnt.codes(INAUDIBLE, len(halves), tuning, kept=kept, told=told)


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

    def loss(weights: Mapping[str, Tensor], index: int) -> Tensor:
        return (block.forward(weights, index) - block.wanted(index)).square().mean()

    losses = lambda codes: sampled(codes, widths, loss, block.batches)  # noqa: E731
    learnt = Nested(start, block.weights(), tuple(widths), loss, losses, lambda: stats)
    return learnt.codes(None, block.batches, tuning, told=told)


@dataclass(frozen=True, slots=True)
class Nested:
    """Nested codes that are to be learned, whatever their loss.

    loss(weights, i): of the weights seen at one width, on batch i · losses(codes): of every width, to compare two codes
    · stats(): of the layers, asked for where wide widths are settled
    """

    start: Mapping[str, QWeight]
    weights: Mapping[str, Tensor]
    widths: tuple[int, ...]
    loss: Loss
    losses: Callable[[Mapping[str, QWeight]], dict[int, float]]
    stats: Callable[[], Mapping[str, LayerStats]]

    def codes(
        self, least: float | None, batches: int, tuning: Tuning, *, kept: KeptState | None = None, told: Advance
    ) -> dict[str, QWeight]:
        """Gradient steps, narrow widths in turns; then the bits behind them.

        least: differences of losses below it do not count; None: SLIGHT of what the widest narrow width loses
        """
        narrow, wide = [b for b in sorted(self.widths) if b <= NARROW], [b for b in self.widths if b > NARROW]
        if not narrow:
            return dict(self.start)  # wide widths are as good as their layers' optimum
        order = batch_order(batches, tuning)
        objective = lambda values, step: self.loss(values(narrow[step % len(narrow)]), order[step])  # noqa: E731
        learned = train_nested(self.start, self.weights, objective, narrow, tuning, kept=kept, told=told)
        stats = self.stats() if wide else {}
        before = self.losses(self.start)
        least = SLIGHT * before[narrow[-1]] if least is None else least
        codes = lambda reach: settled(learned(reach), self.weights, stats, narrow[-1], wide)  # noqa: E731
        found = first_better(codes, lambda codes: better(before, self.losses(codes), least))
        told(LAST)
        return dict(self.start) if found is None else found


def first_better(
    codes: Callable[[float], dict[str, QWeight]], good: Callable[[Mapping[str, QWeight]], bool]
) -> dict[str, QWeight] | None:
    """The codes of the largest reach that are good, if any are.

    What wide widths pay grows with the square of the reach, what narrow ones gain hardly does.
    """
    return next((found for found in map(codes, REACHES) if good(found)), None)


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
def sampled(codes: Mapping[str, QWeight], widths: Sequence[int], loss: Loss, batches: int) -> dict[int, float]:
    """Mean loss of every width over a few batches."""
    sample = range(0, batches, max(1, batches // SAMPLE))
    found = {}
    for width in widths:
        dense = {name: q.dequantize(min(width, q.bits)) for name, q in codes.items()}
        found[width] = sum(float(loss(dense, i)) for i in sample) / len(sample)
    return found
