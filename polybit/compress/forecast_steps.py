"""What learned rounding will take, told from a few gradient steps of one block and of a slice of the head."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from polybit.compress.blocks import VisitedBlock
from polybit.compress.recipe import Recipe
from polybit.compress.refine import BLOCK, TEACHER_BYTES
from polybit.core.affine import QWeight
from polybit.core.memory import keeping_freed
from polybit.quant.rounding import LAST, Tuning, train

STEPS = 3  # that are tried; the first one lays things out and is not counted
SLICE = 4096  # tokens of the vocabulary that are tried
STATES, LOGITS = 9, 4  # hidden states the teacher keeps of a batch, and tensors as large as the logits at one time

Seconds = tuple[float, float]  # wall, CPU


@dataclass(frozen=True, slots=True)
class TimedSteps:
    """One batch of calibration text, seconds (wall, CPU) and bytes.

    step: a gradient step of the block · forward: the float block · head: a gradient step of what follows the blocks,
    its teacher among it · held: bytes a block keeps for the way back · hidden, logits: bytes of a hidden state and of
    the logits
    """

    step: Seconds
    forward: Seconds
    head: Seconds
    held: int
    hidden: int
    logits: int


def now() -> Seconds:
    """Wall and CPU clocks."""
    return time.perf_counter(), time.process_time()


def time_steps(block: VisitedBlock, start: Mapping[str, QWeight], vocabulary: int) -> TimedSteps:
    """A few steps of learned rounding on the first batch of a block; nothing is kept of them."""
    weights, laps = block.weights(), [now()]
    with torch.no_grad():
        wanted = block.forward({}, 0)
    laps.append(now())
    forward = (laps[1][0] - laps[0][0], laps[1][1] - laps[0][1])
    taken: list[Seconds] = []

    def told(amount: float, *, found: bool = False) -> None:
        taken.append(now())

    def loss(weights: Mapping[str, Tensor], _step: int) -> Tensor:
        return (block.forward(weights, 0) - wanted).square().mean()

    with saved_bytes() as saved, keeping_freed():
        train(start, weights, loss, Tuning(steps=STEPS, lr=BLOCK.lr, scale_lr=BLOCK.scale_lr), told=told)
    first, last = taken[1], taken[-1]  # taken[0] is the start
    step = ((last[0] - first[0]) / (STEPS - 1), (last[1] - first[1]) / (STEPS - 1))
    tokens, hidden = wanted.shape[0] * wanted.shape[1], wanted.shape[-1]
    head = time_head(wanted, vocabulary)
    # what a step of the finish keeps beside it, latents, gradients and moments, is counted by the weight
    held = max(saved.bytes // STEPS - sum(4 * w.numel() for w in weights.values()), 0)
    return TimedSteps(step, forward, head, held, 4 * tokens * hidden, 4 * tokens * vocabulary)


def time_head(like_BTD: Tensor, vocabulary: int) -> Seconds:
    """A gradient step of KL through the head, and the teacher's head before it, from a slice of the vocabulary."""
    taken, hidden = min(SLICE, vocabulary), like_BTD.shape[-1]
    state_BTD = torch.randn_like(like_BTD).requires_grad_()
    head_VD = torch.randn(taken, hidden) / hidden**0.5  # wider logits have probabilities too small for fast arithmetic
    laps = [now()]
    for _ in range(2):  # the first one lays things out
        with torch.no_grad():
            log_BTV = log_softmax((state_BTD @ head_VD.T)[:, :-1], -1)
            probability_BTV = log_BTV.exp()
            entropy = (probability_BTV * log_BTV).sum(-1).mean()
        given_BTV = log_softmax((state_BTD @ head_VD.T)[:, :-1], -1)
        (entropy - (probability_BTV * given_BTV).sum(-1).mean()).backward()
        laps.append(now())
    return (laps[2][0] - laps[1][0]) * vocabulary / taken, (laps[2][1] - laps[1][1]) * vocabulary / taken


class Saved:
    """How many bytes autograd has kept, each storage once a step."""

    bytes = 0


@contextmanager
def saved_bytes() -> Iterator[Saved]:
    """Counts what autograd keeps for the way back."""
    found, seen = Saved(), set[int]()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            found.bytes += tensor.untyped_storage().nbytes()
        return tensor

    def give(tensor: Tensor) -> Tensor:
        seen.clear()  # the way back has begun: what is kept after it is of another step
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, give):
        yield found


def learning_seconds(timed: TimedSteps, recipe: Recipe, *, blocks: float, batches: int) -> Seconds:
    """Of all gradient steps of a recipe; nested codes, whose steps are of another kind, are not foretold.

    blocks: how many times the weights of the tried one there are · batches: of calibration text
    """

    def total(which: int) -> float:
        step, forward, head = timed.step[which], timed.forward[which], timed.head[which]
        if recipe.finish_steps:
            passes = min(batches, recipe.finish_steps)
            return (recipe.finish_steps + LAST) * (blocks * step + head) + passes * (blocks * forward + head / 3)
        return blocks * ((recipe.block_steps + LAST) * step + 2 * batches * forward)

    return total(0), total(1)


def learning_bytes(timed: TimedSteps, recipe: Recipe, *, weights: int, blocks: float, batches: int) -> int:
    """Memory of learned rounding over the whole model beside its float weights; 0 where it goes block by block."""
    if not recipe.finish_steps:
        return 0
    states = min(TEACHER_BYTES, batches * STATES * timed.hidden)
    return int(recipe.finish_bytes * weights + blocks * timed.held + LOGITS * timed.logits + states)
