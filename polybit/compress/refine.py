"""Learned rounding of one block against its float outputs, and of all blocks at once against the float model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from polybit.compress.blocks import VisitedBlock, Whole
from polybit.compress.entering import answers_with_tuple, entered, outputs_of
from polybit.compress.stats import collect
from polybit.core.affine import QWeight
from polybit.core.memory import keeping_freed
from polybit.core.records import LayerStats
from polybit.core.runtime import Advance, progress
from polybit.nn.convert import Target
from polybit.quant.rounding import LAST, Tuning, Values, batch_order, refine, train
from polybit.quant.steps import KeptState, untold

BLOCK = Tuning(steps=200, lr=0.00125, scale_lr=0.005, inside=0.45)
FINISH = Tuning(steps=200, lr=0.005, scale_lr=0.002, inside=0.45)
NESTED = Tuning(steps=300, lr=0.01, scale_lr=0.0, ratio_lr=0.001, reach=1.0)  # steps in codes of all stored bits
ANCHORED = 5  # widths from here on are held by layer losses instead of runs of the model
EMPHASIS = {8: 1.0, 7: 2.0, 6: 4.0, 5: 2.0, 4: 1.0, 3: 1.0, 2: 1.0}  # weight of each width's relative loss
HIDDEN = 20.0  # weight of the hidden states' relative squared error beside the KL in nats; little of it overfits
NESTED_HIDDEN = 1.5  # the same for nested codes, whose KL is divided by its start's
INAUDIBLE = 1e-3  # nats per token; differences below it do not count when widths are compared
WORST = 1.3  # factor by which no width may lose, whatever the others gain
SAMPLE = 8  # batches on which the widths are compared before and after
LEARNING = "learned rounding"  # what progress calls it
TEACHER_BYTES = 1 << 30  # the teacher's hidden states are kept up to this size, and computed again beyond it


def refine_block(
    block: VisitedBlock, start: Mapping[str, QWeight], *, tuning: Tuning = BLOCK, told: Advance = untold
) -> dict[str, QWeight]:
    """Train the codes of one block so that, on the quantized prefix's inputs, it gives what the float model gives.

    The loss is the mean squared difference over its mean square at the start of the block's own update.
    """
    with torch.no_grad():
        updates = [(block.wanted(i) - block.references[i]).square().mean() for i in range(block.batches)]
        level = float(torch.stack(updates).mean()) or 1.0

    def loss(weights: Mapping[str, Tensor], index: int) -> Tensor:
        return (block.forward(weights, index) - block.wanted(index)).square().mean() / level

    return refine(start, block.weights(), loss, block.batches, tuning=tuning, told=told)


def finish_model(
    model: nn.Module,
    batches: Sequence[Tensor],
    targets: Sequence[Target],
    start: Mapping[str, QWeight],
    *,
    widths: Sequence[int] | None = None,
    tuning: Tuning = FINISH,
    kept: KeptState | None = None,
) -> dict[str, QWeight]:
    """Train the codes of all weights at once so that the model's next-token distribution stays the float model's.

    The loss is KL(float || quantized), nats per token, on the calibration windows, beside the error of the hidden
    states; what is stored stays integer codes and scales. With `widths` the start holds nested codes, and all these
    widths are trained together (`refine_nested`; of the tuning only steps and seed count then).
    Needs the whole model's weights, gradients and optimizer state in memory: about 20 bytes a weight.
    kept: where the state lies between two runs of the same; progress is shown.
    Returns the start when training did not lower the loss on the calibration windows.
    """
    whole = Whole(model, tuple(target for target in targets if target.name in start))
    teacher = Teacher(whole, batches, HIDDEN if widths is None else NESTED_HIDDEN)
    weights = {target.name: target.weight_OI(model) for target in whole.targets}
    start = {name: q.to(weights[name].device) for name, q in start.items()}
    if widths is None:
        count = len(batches)
        with progress(LEARNING, tuning.steps + LAST) as told, keeping_freed():
            how: dict[str, Any] = {"score": teacher.divergence, "kept": kept, "told": told}
            return refine(start, weights, teacher.distance, count, tuning=tuning, **how)
    stats = collect(model, batches, whole.targets)
    tuning = replace(NESTED, steps=tuning.steps, seed=tuning.seed)
    with progress(LEARNING, tuning.steps) as told, keeping_freed():
        return refine_nested(start, weights, stats, teacher, widths=widths, tuning=tuning, kept=kept, told=told)


def refine_nested(
    start: Mapping[str, QWeight],
    weights: Mapping[str, Tensor],
    stats: Mapping[str, LayerStats],
    teacher: Teacher,
    *,
    widths: Sequence[int],
    tuning: Tuning,
    kept: KeptState | None = None,
    told: Advance = untold,
) -> dict[str, QWeight]:
    """Train nested codes so that every width is good: the sum over widths of the loss relative to the start's.

    A gradient that suits 2 bits moves codes by more than 8 bits can bear, and each step can run the model at one width
    only. So wide widths (ANCHORED and up) are held by their layer losses tr(E H E^T), smooth, without a forward pass
    and present in every step, while narrow widths take turns with the KL of the whole model.
    """
    count = len(teacher.batches)
    sample = range(0, count, max(1, count // SAMPLE))
    narrow = [b for b in sorted(widths) if b < ANCHORED]
    if not narrow:
        return dict(start)  # wide widths are as good as their layers' optimum
    wide = [b for b in sorted(widths) if b >= ANCHORED]
    first = {b: divergences(start, b, teacher, sample) for b in widths}
    anchors = Anchors(start, weights, stats, wide)
    order = batch_order(count, tuning)

    def objective(values: Values, step: int) -> Tensor:
        width = narrow[step % len(narrow)]
        term = teacher.distance(values(width), order[step]) * (EMPHASIS[width] * len(narrow) / first[width])
        return term + sum(EMPHASIS[b] * anchors(values(b), b) for b in wide)

    trained = train(start, weights, objective, tuning, kept=kept, told=told)
    last = {b: divergences(trained, b, teacher, sample) for b in widths}
    changes = [max(last[b], INAUDIBLE) / max(first[b], INAUDIBLE) for b in widths]
    better = sum(changes) < len(changes) and max(changes) < WORST
    return dict(trained if better else start)


class Anchors:
    """Layer losses of nested codes at some widths, relative to the start's: mean over layers, 1 at the start."""

    def __init__(
        self,
        start: Mapping[str, QWeight],
        weights: Mapping[str, Tensor],
        stats: Mapping[str, LayerStats],
        widths: Sequence[int],
    ) -> None:
        self.weights = {name: weights[name].float() for name in start if name in stats}
        self.hessians = {name: stats[name].hessian_II for name in self.weights}
        self.level: dict[int, dict[str, Tensor]] = {}
        for b in widths:
            self.level[b] = {n: self.loss(n, start[n].dequantize(b)).clamp_min(1e-12) for n in self.weights}

    def loss(self, name: str, weight_OI: Tensor) -> Tensor:
        """tr(E H E^T) of one layer, with the damping GPTQ uses."""
        error_OI = weight_OI - self.weights[name]
        hessian_II = self.hessians[name]
        damp = 0.01 * hessian_II.diagonal().mean()
        return ((error_OI @ hessian_II) * error_OI).sum() + damp * error_OI.square().sum()

    def __call__(self, weights: Mapping[str, Tensor], width: int) -> Tensor:
        """Mean of the relative losses at one width."""
        terms = [self.loss(name, weights[name]) / level for name, level in self.level[width].items()]
        return torch.stack(terms).mean()


@torch.no_grad()
def divergences(codes: Mapping[str, QWeight], width: int, teacher: Teacher, sample: Sequence[int]) -> float:
    """Mean KL at one width over some batches, nats per token; never quite zero, so that it can be divided by."""
    dense = {name: q.dequantize(min(width, q.bits)) for name, q in codes.items()}
    return max(sum(float(teacher.divergence(dense, i)) for i in sample) / len(sample), 1e-9)


@dataclass(frozen=True, slots=True)
class FloatStates:
    """The float model's hidden states on one batch: behind its last block, and on the way with their mean squares."""

    last_BTD: Tensor
    hidden: list[Tensor]
    levels: list[Tensor]

    def nbytes(self) -> int:
        """Memory they take."""
        return sum(t.nbytes for t in (self.last_BTD, *self.hidden))


class Teacher:
    """The float model on the calibration windows; the last position of a window predicts nothing known.

    Its hidden states are kept up to TEACHER_BYTES, not its distributions, which are as wide as the vocabulary: the head
    alone makes them again.
    """

    def __init__(self, whole: Whole, batches: Sequence[Tensor], hidden: float = HIDDEN) -> None:
        self.whole, self.batches, self.hidden = whole, batches, hidden
        self.kept: dict[int, FloatStates] = {}
        self.room = TEACHER_BYTES
        self.wraps = answers_with_tuple(whole.model, whole.blocks[0], batches[0])

    def divergence(self, weights: Mapping[str, Tensor], index: int) -> Tensor:
        """KL(float || quantized) on batch `index`, nats per token."""
        return self._divergence(self.whole.forward(weights, self.batches[index]), index)

    def distance(self, weights: Mapping[str, Tensor], index: int) -> Tensor:
        """The loss of training: KL, plus `hidden` times the relative squared error of the hidden states.

        The hidden states say more per token than the next token's distribution does: less is learnt by heart.
        """
        known = self.states(index)
        logits_BTV, hidden = self.whole.states(weights, self.batches[index])
        pairs = zip(hidden, known.hidden, known.levels, strict=True)
        errors = [(given - wanted).square().mean() / level for given, wanted, level in pairs]
        return self._divergence(logits_BTV, index) + self.hidden * torch.stack(errors).mean()

    def _divergence(self, logits_BTV: Tensor, index: int) -> Tensor:
        probability_BTV, negative_entropy = self.answer(index)
        given_BTV = log_softmax(logits_BTV[:, :-1].float(), -1)
        return negative_entropy - (probability_BTV * given_BTV).sum(-1).mean()

    @torch.no_grad()
    def states(self, index: int) -> FloatStates:
        """The float model's hidden states on batch `index`."""
        if index in self.kept:
            return self.kept[index]
        with outputs_of(self.whole.blocks[-1]) as found:
            _, hidden = self.whole.states({}, self.batches[index])
        known = FloatStates(found[-1], hidden, [h.square().mean().clamp_min(1e-12) for h in hidden])
        if known.nbytes() <= self.room:
            self.room -= known.nbytes()
            self.kept[index] = known
        return known

    @torch.no_grad()
    def answer(self, index: int) -> tuple[Tensor, Tensor]:
        """The float model's probabilities [B, T - 1, V] of the next tokens of batch `index`; mean over tokens of sum
        p log p."""
        blocks = self.whole.blocks
        with entered(blocks, len(blocks), self.states(index).last_BTD, self.wraps):
            logits_BTV = self.whole.forward({}, self.batches[index])
        log_BTV = log_softmax(logits_BTV[:, :-1].float(), -1)
        probability_BTV = log_BTV.exp()
        return probability_BTV, (probability_BTV * log_BTV).sum(-1).mean()
