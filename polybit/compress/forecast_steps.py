"""What learned rounding will take, told from a few gradient steps of one block and of a slice of the head.

Steps of nested codes are told from one turn of their narrow widths, and what follows them from one block as well: its
statistics, and the bits behind the narrow widths.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from polybit.compress.blocks import VisitedBlock
from polybit.compress.recipe import Recipe
from polybit.compress.refine import BLOCK, TEACHER_BYTES
from polybit.compress.refine_nested import SAMPLE, settled
from polybit.core.affine import QWeight
from polybit.core.memory import keeping_freed
from polybit.quant.nested_steps import REACH, Values, train_nested
from polybit.quant.rounding import LAST, Tuning, train

TURN = 2  # steps of one width that are tried; of nested codes one step of every narrow width
SLICE = 4096  # tokens of the vocabulary that are tried
STATES, LOGITS = 9, 4  # hidden states the teacher keeps of a batch, and tensors as large as the logits at one time

Seconds = tuple[float, float]  # wall, CPU


@dataclass(frozen=True, slots=True)
class TimedSteps:
    """One batch of text as a step reads it, seconds (wall, CPU) and bytes.

    forward: the float block · step: a gradient step of the block · head: a gradient step of what follows the blocks,
    its teacher among it · held: bytes a block keeps for the way back · hidden, logits: bytes of a hidden state and of
    the logits · stats, settled: of nested codes, the statistics of the block's layers, and their bits that wide widths
    read beyond the narrow ones
    """

    forward: Seconds
    step: Seconds
    head: Seconds
    held: int
    hidden: int
    logits: int
    stats: Seconds = (0.0, 0.0)
    settled: Seconds = (0.0, 0.0)


def now() -> Seconds:
    """Wall and CPU clocks."""
    return time.perf_counter(), time.process_time()


def time_steps(block: VisitedBlock, start: Mapping[str, QWeight], vocabulary: int, recipe: Recipe) -> TimedSteps:
    """A few steps of learned rounding on the first batch of a block; nothing is kept of them."""
    weights, laps = block.weights(), [now()]
    with torch.no_grad():
        wanted = block.forward({}, 0)
    laps.append(now())
    narrow = sorted(recipe.learned_widths)
    turn = len(narrow) if recipe.is_nested else TURN
    taken: list[Seconds] = []

    def told(amount: float, *, found: bool = False) -> None:
        taken.append(now())

    def loss(weights: Mapping[str, Tensor], _step: int) -> Tensor:
        return (block.forward(weights, 0) - wanted).square().mean()

    def loss_of_one(values: Values, step: int) -> Tensor:
        return loss(values(narrow[step % turn]), step)

    more: dict[str, Seconds] = {}
    with saved_bytes() as saved, keeping_freed():
        tuning = Tuning(steps=turn + 1, lr=BLOCK.lr, scale_lr=BLOCK.scale_lr, inside=BLOCK.inside)
        if recipe.is_nested:
            learned = train_nested(start, weights, loss_of_one, narrow, tuning, told=told)(REACH)
            more = time_settling(block, learned, narrow[-1], [b for b in recipe.widths if b > narrow[-1]])
        else:
            train(start, weights, loss, tuning, told=told)
    first, last = taken[1], taken[turn + 1]  # taken[0] is the start, and the first step lays things out
    step = ((last[0] - first[0]) / turn, (last[1] - first[1]) / turn)
    tokens, hidden = wanted.shape[0] * wanted.shape[1], wanted.shape[-1]
    head = time_head(wanted, vocabulary)
    # what a step of the finish keeps beside it, latents, gradients and moments, is counted by the weight
    held = max(saved.bytes // (turn + 1) - sum(4 * w.numel() for w in weights.values()), 0)
    return TimedSteps(
        between(laps),
        step=step,
        head=head,
        held=held,
        hidden=4 * tokens * hidden,
        logits=4 * tokens * vocabulary,
        **more,
    )


def time_settling(
    block: VisitedBlock, codes: Mapping[str, QWeight], held: int, wide: Sequence[int]
) -> dict[str, Seconds]:
    """The statistics of one batch of a block, and its bits behind the leading `held`, for the wide widths."""
    laps = [now()]
    stats = block.stats() if wide else {}
    laps.append(now())
    settled(codes, block.weights(), stats, held, wide)
    laps.append(now())
    return {"stats": between(laps[:2]), "settled": between(laps[1:])}


def between(laps: Sequence[Seconds]) -> Seconds:
    """From the first to the last."""
    return laps[-1][0] - laps[0][0], laps[-1][1] - laps[0][1]


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
    """Of all gradient steps of a recipe, and of what follows them.

    blocks: how many times the weights of the tried one there are · batches: of calibration text, as steps read it
    """
    steps = recipe.finish_steps or recipe.block_steps

    def total(which: int) -> float:
        head = timed.head[which] if recipe.finish_steps else 0.0
        step = blocks * timed.step[which] + head
        passed = blocks * timed.forward[which] + head / 3  # there is no way back
        passes = min(batches, steps) if recipe.finish_steps else 2 * batches  # of the float model; of both paths
        if not recipe.is_nested:
            return (steps + LAST) * step + passes * passed
        compared = 2 * len(recipe.widths) * min(SAMPLE, batches)  # before, and at one reach
        settling = blocks * (batches * timed.stats[which] + timed.settled[which])
        return steps * step + (passes + compared) * passed + settling

    return total(0), total(1)


def learning_bytes(timed: TimedSteps, recipe: Recipe, *, weights: int, blocks: float, batches: int) -> int:
    """Memory of learned rounding over the whole model beside its float weights; 0 where it goes block by block."""
    if not recipe.finish_steps:
        return 0
    states = min(TEACHER_BYTES, batches * STATES * timed.hidden)
    return int(recipe.finish_bytes * weights + blocks * timed.held + LOGITS * timed.logits + states)
