"""How weights become codes: the recipe a method, a width and an effort mean, and what of it a machine can afford."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from polybit.core.affine import Grid, ZeroKind
from polybit.core.parts import pick
from polybit.core.plan import PLAN, Plan, largest_width
from polybit.core.runtime import PolybitError
from polybit.nn.convert import Target
from polybit.quant.table import QUANTIZERS, Effort, Quantizer

FINISH_BYTES = 20  # latent, gradient, two moments of Adam and the value itself, per weight
NARROW_BYTES = 16  # latent, gradient and moments again, per weight and further width of a nested code that is learned
STATE_BYTES = 12  # of it that is kept on disk for a run that is ended: latent and moments; twice while it is written
NARROW = 5  # the widest width of a nested code that is learned; wider ones are chosen behind it
# of the machine's memory that the finish may take before it is left out, by the effort that asks for it
FINISH_SHARE: Mapping[Effort, float] = {"fast": 0.0, "normal": 0.25, "best": 0.4}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How weights become codes.

    method: a name of the table of quantizers
    widths: what the checkpoint will run at, widest first; several for a nested method
    block_steps, finish_steps: gradient steps of learned rounding per block and over the whole model (0 = none)
    knobs: keywords of the quantizer
    plan: widths per layer and inside layers. Of one fixed file (a single width, the plan's largest) they are the widths
        that are stored; a nested file is not changed by a plan, which then says how it is read.
    """

    method: str
    grid: Grid
    widths: tuple[int, ...]
    block_steps: int = 0
    finish_steps: int = 0
    seed: int = 0
    knobs: Mapping[str, Any] = field(default_factory=dict)
    plan: Plan | None = None

    def __post_init__(self) -> None:
        pick(QUANTIZERS, self.method, "method")
        if len(self.widths) > 1 and not self.is_nested:
            raise PolybitError(
                f"method {self.method} makes a file of one width and got {', '.join(map(str, self.widths))}: "
                "give one width, or a nested method"
            )

    @property
    def is_nested(self) -> bool:
        """Whether one code serves several widths."""
        return QUANTIZERS[self.method].nested

    @property
    def layerwise(self) -> Quantizer:
        """What makes the codes of one layer: the method, or what a learned one starts from."""
        part = QUANTIZERS[self.method]
        return QUANTIZERS[part.start] if part.start else part

    @property
    def reads_text(self) -> bool:
        """Whether calibration text has a part in the codes."""
        return self.layerwise.needs_stats or bool(self.block_steps or self.finish_steps)

    @property
    def learned_widths(self) -> tuple[int, ...]:
        """The widths that have latent weights of their own in gradient steps over the whole model."""
        return tuple(b for b in self.widths if b <= NARROW) if self.is_nested else self.widths[:1]

    @property
    def finish_bytes(self) -> int:
        """Memory of those steps, per weight."""
        return FINISH_BYTES + NARROW_BYTES * max(len(self.learned_widths) - 1, 0)

    @property
    def presets(self) -> list[str]:
        """What the checkpoint can be read at."""
        widths = [f"w{b}" for b in self.widths]
        if self.plan is None:
            return widths
        return [*widths, PLAN] if self.is_nested else [PLAN]

    def grid_of(self, layer: str, columns: int) -> Grid:
        """The grid of one layer's codes; a plan whose column widths do not fit the layer is refused."""
        if self.plan is None or self.is_nested:
            return self.grid
        widths_G = self.plan.group_widths(layer, columns, self.grid.group_size)
        return self.grid.with_widths(widths_G or (self.plan.at(layer).w,))

    def narrowed(self, targets: Sequence[Target]) -> Recipe:
        """The recipe of a fixed plan with no more bits than the widest of its layers has; others as they are."""
        if self.is_nested or self.plan is None:
            return self
        bits = max(self.grid_of(target.name, target.columns).bits for target in targets)
        return replace(self, widths=(bits,), grid=replace(self.grid, bits=bits))

    def to_json(self) -> dict[str, Any]:
        """For the fingerprint of a resumable run and for run.json."""
        return {
            "method": self.method,
            "bits": self.grid.bits,
            "group_size": self.grid.group_size,
            "zero": self.grid.zero,
            "widths": list(self.widths),
            "block_steps": self.block_steps,
            "finish_steps": self.finish_steps,
            "seed": self.seed,
            **dict(self.knobs),
            **({} if self.plan is None else {"plan": self.plan.to_json()}),
        }


def choose(
    method: str,
    widths: Sequence[int] | None,
    group_size: int,
    *,
    asymmetric: bool | None = None,
    effort: Effort = "normal",
    seed: int = 0,
    plan: Plan | None = None,
) -> Recipe:
    """The recipe of a method, with the kind of zero and the gradient steps its line in the table gives.

    method: a name of the table of quantizers
    widths: of the checkpoint, widest first; None: the largest of a fixed file's plan
    asymmetric: whether every group stores a zero point; None: as the method does
    effort: how much learning is allowed
    """
    part = pick(QUANTIZERS, method, "--method")
    if widths is None:
        assert plan is not None
        widths = (largest_width(plan),)
    efforts = get_args(Effort)
    allowed = part.learned is not None and efforts.index(effort) >= efforts.index(part.learned.effort)
    steps = part.learned.steps if part.learned and allowed else 0
    return Recipe(
        method,
        Grid(max(widths), group_size, zero_of(part, asymmetric)),
        tuple(widths),
        finish_steps=steps,
        seed=seed,
        plan=plan,
    )


def zero_of(part: Quantizer, asymmetric: bool | None) -> ZeroKind:
    """The kind of zero of a quantizer's codes; asymmetric: as in `choose`."""
    return part.zero if asymmetric is None else "group" if asymmetric else "centre"


def within_memory(recipe: Recipe, weights: int) -> Recipe:
    """The recipe, learning block by block where training `weights` weights at once would crowd the machine's memory.

    Methods without steps per block then stay as their layers' own optimum. Decided by the machine's total memory, not
    by what is free just now, so that a resumed run decides the same.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    learned = QUANTIZERS[recipe.method].learned
    if recipe.finish_steps and learned and recipe.finish_bytes * weights > FINISH_SHARE[learned.effort] * total:
        return replace(recipe, finish_steps=0, block_steps=learned.block_steps)
    return recipe
