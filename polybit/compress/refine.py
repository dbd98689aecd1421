"""Learned rounding of one block against its float outputs, and of all blocks at once against the float model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from polybit.compress.blocks import VisitedBlock, Whole
from polybit.compress.entering import answers_with_tuple, entered, outputs_of
from polybit.core.affine import QWeight
from polybit.core.memory import keeping_freed
from polybit.core.runtime import Advance, progress
from polybit.nn.convert import Target
from polybit.quant.rounding import LAST, Tuning, refine
from polybit.quant.steps import KeptState, untold

BLOCK = Tuning(steps=200, lr=0.00125, scale_lr=0.005, inside=0.45)
FINISH = Tuning(steps=200, lr=0.005, scale_lr=0.002, inside=0.45)
HIDDEN = 20.0  # weight of the hidden states' relative squared error beside the KL in nats; little of it overfits
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
    tuning: Tuning = FINISH,
    kept: KeptState | None = None,
) -> dict[str, QWeight]:
    """Train the codes of all weights at once so that the model's next-token distribution stays the float model's.

    The loss is KL(float || quantized), nats per token, on the calibration windows, beside the error of the hidden
    states; what is stored stays integer codes and scales. Needs the whole model's weights, gradients and optimizer
    state in memory: about 20 bytes a weight. kept: where the state lies between two runs of the same; progress is
    shown. Returns the start when training did not lower the loss on the calibration windows.
    """
    teacher, weights, start = taught(model, batches, targets, start)
    with progress(LEARNING, tuning.steps + LAST) as told, keeping_freed():
        how: dict[str, Any] = {"score": teacher.divergence, "kept": kept, "told": told}
        return refine(start, weights, teacher.distance, len(batches), tuning=tuning, **how)


def taught(
    model: nn.Module, batches: Sequence[Tensor], targets: Sequence[Target], start: Mapping[str, QWeight]
) -> tuple[Teacher, dict[str, Tensor], dict[str, QWeight]]:
    """(teacher, float weights by name, the start's codes beside them) of what is trained together."""
    whole = Whole(model, tuple(target for target in targets if target.name in start))
    weights = {target.name: target.weight_OI(model) for target in whole.targets}
    return Teacher(whole, batches), weights, {name: q.to(weights[name].device) for name, q in start.items()}


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

    def __init__(self, whole: Whole, batches: Sequence[Tensor]) -> None:
        self.whole, self.batches = whole, batches
        self.kept: dict[int, FloatStates] = {}
        self.room = TEACHER_BYTES
        self.wraps = answers_with_tuple(whole.model, whole.blocks[0], batches[0])

    def divergence(self, weights: Mapping[str, Tensor], index: int) -> Tensor:
        """KL(float || quantized) on batch `index`, nats per token."""
        return self._divergence(self.whole.forward(weights, self.batches[index]), index)

    def distance(self, weights: Mapping[str, Tensor], index: int) -> Tensor:
        """The loss of training: KL, plus HIDDEN times the relative squared error of the hidden states.

        The hidden states say more per token than the next token's distribution does: less is learnt by heart.
        """
        known = self.states(index)
        logits_BTV, hidden = self.whole.states(weights, self.batches[index])
        pairs = zip(hidden, known.hidden, known.levels, strict=True)
        errors = [(given - wanted).square().mean() / level for given, wanted, level in pairs]
        return self._divergence(logits_BTV, index) + HIDDEN * torch.stack(errors).mean()

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
