"""Which presets a training step uses: all, one, cycling, drawn at random, or the sandwich of both ends and some."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polybit.core.parts import pick
from polybit.core.plan import Plan
from polybit.core.precision import FLOAT
from polybit.core.runtime import PolybitError
from polybit.train.table import SCHEDULES, Schedule

RANGE_SHARE = 0.2  # share of the float model's progress a precision must make to be worth cycling through


def widest_first(presets: Mapping[str, Plan], layers: Sequence[str]) -> tuple[str, ...]:
    """Preset names from the most to the least precise: by weight bits over layers, then by activation bits."""

    def bits(name: str) -> tuple[float, float]:
        precisions = [presets[name].at(layer) for layer in layers] or [presets[name].default]
        return -sum(p.w for p in precisions) / len(precisions), -sum(p.a for p in precisions) / len(precisions)

    return tuple(sorted(presets, key=bits))


def preset_bits(plan: Plan, layers: Sequence[str]) -> float:
    """Mean weight bits of a plan over layers, each counted once; what a cycle climbs."""
    widths = [plan.at(layer).w for layer in layers] or [plan.default.w]
    return sum(widths) / len(widths)


def every(step: int, presets: tuple[str, ...]) -> tuple[str, ...]:
    """All presets at every step, in their order."""
    return presets


def in_turn(step: int, presets: tuple[str, ...]) -> tuple[str, ...]:
    """One preset a step, each in its turn."""
    return (presets[step % len(presets)],)


@dataclass(frozen=True, slots=True)
class Fixed:
    """One preset at every step: the model trained for it alone."""

    name: str

    def __call__(self, step: int, presets: tuple[str, ...]) -> tuple[str, ...]:
        """The one preset."""
        if self.name not in presets:
            raise PolybitError(f"the schedule is fixed to {self.name!r:.60}: choose one of {', '.join(presets)}")
        return (self.name,)


def cyclic_bits(step: int, length: int, low: float, high: float) -> int:
    """Bits of a step of a cycle of `length` steps: rises from low to high along a cosine, then drops.

    CPT (arXiv 2101.09868) eq. 1: rint(low + (high - low) (1 - cos(pi (t mod T) / T)) / 2).
    """
    return round(low + 0.5 * (high - low) * (1 - math.cos(math.pi * (step % length) / length)))


@dataclass(frozen=True, slots=True)
class Cyclic:
    """One preset a step, its bits nearest to CPT's cosine between the lowest and the highest; the wider of two.

    bits: preset -> weight bits · length: steps of a cycle.
    """

    bits: Mapping[str, float]
    length: int

    def __call__(self, step: int, presets: tuple[str, ...]) -> tuple[str, ...]:
        """The preset of this place in the cycle."""
        there = [self.bits[name] for name in presets]
        wanted = cyclic_bits(step, self.length, min(there), max(there))
        return (min(presets, key=lambda name: (abs(self.bits[name] - wanted), -self.bits[name])),)


def cyclic(presets: Mapping[str, Plan], layers: Sequence[str], *, steps: int, cycles: int, seed: int = 0) -> Cyclic:
    """A cyclic schedule of so many whole cycles; refused when a cycle would not fit the run or see every preset."""
    if cycles < 1 or steps // cycles < len(presets):
        raise PolybitError(
            f"{cycles} cycles do not fit {steps} steps: give 1 to {max(1, steps // len(presets))} cycles, so that each "
            f"has a step for every one of the {len(presets)} presets"
        )
    return Cyclic({name: preset_bits(plan, layers) for name, plan in presets.items()}, steps // cycles)


@dataclass(frozen=True, slots=True)
class Drawn:
    """`count` different presets a step, drawn at random (RPT, Double-Win Quant, ICML 2021: one); seeded by step, so
    that a resumed run draws the same."""

    seed: int = 0
    count: int = 1

    def __call__(self, step: int, presets: tuple[str, ...]) -> tuple[str, ...]:
        """The presets of this step, in their order."""
        drawn = random.Random(f"{self.seed} {step}").sample(presets, min(self.count, len(presets)))
        return tuple(name for name in presets if name in drawn)


@dataclass(frozen=True, slots=True)
class Sandwich:
    """The most and the least precise preset and `count` drawn between (the sandwich rule, arXiv 1903.05134)."""

    seed: int = 0
    count: int = 1

    def __call__(self, step: int, presets: tuple[str, ...]) -> tuple[str, ...]:
        """Both ends and some of the middle, in their order."""
        middle = Drawn(self.seed, self.count)(step, presets[1:-1]) if len(presets) > 2 else ()
        return tuple(name for name in presets if name in (presets[0], presets[-1], *middle))


def precision_range(progress: Mapping[int, float], float_progress: float, *, share: float = RANGE_SHARE) -> int:
    """Lowest width worth cycling through: the first whose loss falls by at least `share` of the float model's fall.

    CPT's precision range test (§3.3): train a short while at each precision from the lowest up, and start the cycle
    where training makes headway. progress: width -> nats the loss fell over the window. Unlike the paper, which looks
    at training accuracy, progress is that of the loss, relative to training in float.
    """
    if float_progress <= 0:
        raise PolybitError(f"the float model's loss changed by {-float_progress:.3g} nats: raise the rate or the steps")
    good = [width for width in sorted(progress) if progress[width] >= share * float_progress]
    if not good:
        raise PolybitError(f"no width of {sorted(progress)} makes {share:.0%} of the float model's progress")
    return good[0]


def always_all(presets: Mapping[str, Plan], layers: Sequence[str], *, steps: int, cycles: int, seed: int) -> Schedule:
    """`--schedule all`."""
    return every


def one_drawn(presets: Mapping[str, Plan], layers: Sequence[str], *, steps: int, cycles: int, seed: int) -> Schedule:
    """`--schedule random`."""
    return Drawn(seed)


def sandwich(presets: Mapping[str, Plan], layers: Sequence[str], *, steps: int, cycles: int, seed: int) -> Schedule:
    """`--schedule sandwich`."""
    return Sandwich(seed)


def widest_only(presets: Mapping[str, Plan], layers: Sequence[str], *, steps: int, cycles: int, seed: int) -> Schedule:
    """`--schedule fixed`: stays at the most precise preset."""
    return Fixed(widest_first(presets, layers)[0])


def choose(
    name: str,
    presets: Mapping[str, Plan],
    layers: Sequence[str],
    *,
    steps: int,
    cycles: int = 8,
    seed: int = 0,
) -> Schedule:
    """A schedule by its name in the table."""
    if any(plan.at(layer).w == FLOAT for plan in presets.values() for layer in layers):
        raise PolybitError("a schedule needs the weight bits of every preset, one leaves a trained layer in float")
    return pick(SCHEDULES, name, "--schedule").build(presets, layers, steps=steps, cycles=cycles, seed=seed)
