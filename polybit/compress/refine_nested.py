"""Learned rounding of nested codes: all weights at once, the narrow widths of one code in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from polybit.compress.recipe import NARROW
from polybit.compress.refine import LEARNING, Teacher, taught
from polybit.compress.stats import collect
from polybit.core.affine import QWeight
from polybit.core.memory import keeping_freed
from polybit.core.runtime import progress
from polybit.nn.convert import Target
from polybit.quant.lower_bits import lower_bits
from polybit.quant.nested_steps import Values, train_nested
from polybit.quant.rounding import LAST, Tuning, batch_order
from polybit.quant.steps import KeptState

NESTED = Tuning(steps=200, lr=0.007, inside=0.4)
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

    before = divergences(start, widths, teacher)
    with progress(LEARNING, tuning.steps + LAST * bool(wide)) as told, keeping_freed():
        trained = train_nested(start, weights, objective, narrow, tuning, kept=kept, told=told)
        if wide:
            stats = collect(model, batches, teacher.whole.targets)
            for name, q in trained.items():
                trained[name] = lower_bits(weights[name], stats.get(name), q, held=narrow[-1], widths=wide)
                told(LAST / len(trained))
    return trained if better(before, divergences(trained, widths, teacher)) else dict(start)


def better(before: Mapping[int, float], after: Mapping[int, float]) -> bool:
    """Whether the widths lost less, in the mean of what is left of their losses, and none much more."""
    left = [max(after[b], INAUDIBLE) / max(before[b], INAUDIBLE) for b in before]
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
