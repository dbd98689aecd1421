"""Learned rounding of one block against its float outputs, and of all blocks at once against the float model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from polybit.core.affine import QWeight
from polybit.measure.blocks import Block, Whole
from polybit.nn.convert import Target
from polybit.quant.rounding import Tuning, refine

BLOCK = Tuning(steps=200, lr=0.005, scale_lr=0.002)
FINISH = Tuning(steps=200, lr=0.005, scale_lr=0.002)
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
    tuning: Tuning = FINISH,
) -> dict[str, QWeight]:
    """Train the codes of all weights at once so that the model's next-token distribution stays the float model's.

    The loss is KL(float || quantized), nats per token, on the calibration windows; what is stored stays integer codes
    and scales. Needs the whole model's weights, gradients and optimizer state in memory: about 20 bytes a weight.
    """
    whole = Whole(model, tuple(target for target in targets if target.name in start))
    teacher = Teacher(whole, batches)

    def loss(weights: Mapping[str, Tensor], index: int) -> Tensor:
        given_BTV = log_softmax(whole.forward(weights, batches[index])[:, :-1].float(), -1)
        wanted_BTV, negative_entropy = teacher(index)
        return negative_entropy - (wanted_BTV * given_BTV).sum(-1).mean()

    weights = {target.name: target.weight_OI(model) for target in whole.targets}
    return refine(start, weights, loss, len(batches), tuning=tuning)


class Teacher:
    """The float model's distributions over the next token, per batch; the last position predicts nothing known."""

    def __init__(self, whole: Whole, batches: Sequence[Tensor]) -> None:
        self.whole, self.batches = whole, batches
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.room = TEACHER_BYTES

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
