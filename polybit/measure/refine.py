"""Learned rounding of one block against its float outputs, and of all blocks at once against the float model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from polybit.core.affine import QWeight
from polybit.core.records import LayerStats
from polybit.measure.blocks import Block, Whole
from polybit.measure.stats import collect
from polybit.nn.convert import Target
from polybit.quant.rounding import Tuning, Values, batch_order, refine, train

BLOCK = Tuning(steps=200, lr=0.005, scale_lr=0.002)
FINISH = Tuning(steps=200, lr=0.005, scale_lr=0.002)
ANCHORED = 5  # widths from here on are held by layer losses instead of runs of the model
EMPHASIS = {8: 0.2, 7: 0.5, 6: 1.0, 5: 1.0, 4: 1.0, 3: 1.0, 2: 1.0}  # weight of each width's relative loss
SAMPLE = 8  # batches on which the widths are compared before and after
TEACHER_BYTES = 1 << 30  # the teacher's distributions are kept up to this size, and recomputed beyond it


def refine_block(block: Block, start: Mapping[str, QWeight], *, tuning: Tuning = BLOCK) -> dict[str, QWeight]:
    """Train the codes of one block so that, on the quantized prefix's inputs, it gives what the float model gives.

    The loss is the mean squared difference over its mean square at the start of the block's own update.
    """
    reference = [block.wanted(index) for index in range(block.batches)]
    with torch.no_grad():
        updates = [(wanted - block.references[i]).square().mean() for i, wanted in enumerate(reference)]
        level = float(torch.stack(updates).mean()) or 1.0

    def loss(weights: Mapping[str, Tensor], index: int) -> Tensor:
        return (block.forward(weights, index) - reference[index]).square().mean() / level

    return refine(start, block.weights(), loss, block.batches, tuning=tuning)


def finish_model(
    model: nn.Module,
    batches: Sequence[Tensor],
    targets: Sequence[Target],
    start: Mapping[str, QWeight],
    *,
    widths: Sequence[int] | None = None,
    tuning: Tuning = FINISH,
) -> dict[str, QWeight]:
    """Train the codes of all weights at once so that the model's next-token distribution stays the float model's.

    The loss is KL(float || quantized), nats per token, on the calibration windows; what is stored stays integer codes
    and scales. With `widths` the start holds nested codes, and all these widths are trained together (`nested_loss`).
    Needs the whole model's weights, gradients and optimizer state in memory: about 20 bytes a weight.
    Returns the start when training did not lower the loss on the calibration windows.
    """
    whole = Whole(model, tuple(target for target in targets if target.name in start))
    teacher = Teacher(whole, batches)
    weights = {target.name: target.weight_OI(model) for target in whole.targets}
    if widths is None:
        return refine(start, weights, teacher.divergence, len(batches), tuning=tuning)
    stats = collect(model, batches, whole.targets)
    return refine_nested(start, weights, stats, teacher, widths=widths, tuning=tuning)


def refine_nested(
    start: Mapping[str, QWeight],
    weights: Mapping[str, Tensor],
    stats: Mapping[str, LayerStats],
    teacher: Teacher,
    *,
    widths: Sequence[int],
    tuning: Tuning,
) -> dict[str, QWeight]:
    """Train nested codes so that every width is good: the sum over widths of the loss relative to the start's.

    A gradient that suits 2 bits moves codes by more than 8 bits can bear, and each step can run the model at one width
    only. So wide widths (ANCHORED and up) are held by their layer losses tr(E H E^T), smooth, without a forward pass
    and present in every step, while narrow widths take turns with the KL of the whole model.
    """
    count = len(teacher.batches)
    sample = range(0, count, max(1, count // SAMPLE))
    narrow = [b for b in sorted(widths) if b < ANCHORED]
    wide = [b for b in sorted(widths) if b >= ANCHORED]
    first = {b: divergences(start, b, teacher, sample) for b in widths}
    anchors = Anchors(start, weights, stats, wide)
    order = batch_order(count, tuning)

    def objective(values: Values, step: int) -> Tensor:
        width = narrow[step % len(narrow)]
        term = teacher.divergence(values(width), order[step]) * (EMPHASIS[width] * len(narrow) / first[width])
        return term + sum(EMPHASIS[b] * anchors(values(b), b) for b in wide)

    trained = train(start, weights, objective, tuning)
    last = {b: divergences(trained, b, teacher, sample) for b in widths}
    better = sum(EMPHASIS[b] * (last[b] / first[b] - 1) for b in widths) < 0
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


class Teacher:
    """The float model's distributions over the next token, per batch; the last position predicts nothing known."""

    def __init__(self, whole: Whole, batches: Sequence[Tensor]) -> None:
        self.whole, self.batches = whole, batches
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.room = TEACHER_BYTES

    def divergence(self, weights: Mapping[str, Tensor], index: int) -> Tensor:
        """KL(float || quantized) on batch `index`, nats per token."""
        given_BTV = log_softmax(self.whole.forward(weights, self.batches[index])[:, :-1].float(), -1)
        wanted_BTV, negative_entropy = self(index)
        return negative_entropy - (wanted_BTV * given_BTV).sum(-1).mean()

    @torch.no_grad()
    def __call__(self, index: int) -> tuple[Tensor, Tensor]:
        """(probabilities [B, T-1, V], mean of sum p log p) of batch `index`."""
        if index in self.kept:
            return self.kept[index]
        log_BTV = log_softmax(self.whole.forward({}, self.batches[index])[:, :-1].float(), -1)
        probability_BTV = log_BTV.exp()
        answer = probability_BTV, (probability_BTV * log_BTV).sum(-1).mean()
        size = probability_BTV.numel() * probability_BTV.element_size()
        if size <= self.room:
            self.room -= size
            self.kept[index] = answer
        return answer
