"""The heart of `polybit quantize`: block by block from float weights to codes, resumable after every block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from polybit.compress.blocks import Block, find_blocks, outside, run_blocks
from polybit.compress.refine import BLOCK, finish_model, refine_block
from polybit.compress.refine import FINISH as FINISH_TUNING
from polybit.core.affine import Grid, QWeight
from polybit.core.plan import Plan
from polybit.core.runtime import track
from polybit.nn.convert import Target
from polybit.quant.problem import layer_loss
from polybit.quant.rtn import rtn
from polybit.quant.table import QUANTIZERS

DATA_FREE = ("rtn", "hqq")  # methods that ask nothing of calibration
PLAN = "plan"  # preset of a checkpoint that was made by a plan
OUTSIDE, FINISH = "outside the blocks", "finish"


class Store(Protocol):
    """Where finished blocks are kept, so that a killed run goes on: hub.checkpoint.Workspace, or a dict in tests."""

    def read(self, block: str) -> dict[str, QWeight] | None:
        """The quantized weights of a finished block, None when it is not finished."""
        ...

    def write(self, block: str, weights: Mapping[str, QWeight]) -> None:
        """Keep the quantized weights of a block."""
        ...


class Nowhere:
    """A store that keeps nothing, for callers that need the codes once."""

    def read(self, block: str) -> None:
        """Nothing is finished."""
        return None

    def write(self, block: str, weights: Mapping[str, QWeight]) -> None:
        """Not kept."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How weights become codes.

    widths: what the checkpoint will run at, widest first · block_steps, finish_steps: gradient steps of learned
    rounding per block and over the whole model (0 = none) · plan: widths per layer and inside layers. Of one fixed
    file (a single width, the plan's largest) they are the widths that are stored; a nested file is not changed by a
    plan, which then says how it is read.
    """

    method: str
    grid: Grid
    widths: tuple[int, ...]
    block_steps: int = 0
    finish_steps: int = 0
    seed: int = 0
    knobs: Mapping[str, Any] = field(default_factory=dict)
    plan: Plan | None = None

    def grid_of(self, layer: str, columns: int) -> Grid:
        """The grid of one layer's codes; a plan whose column widths do not fit the layer is refused."""
        if self.plan is None or is_nested(self):
            return self.grid
        widths_G = self.plan.group_widths(layer, columns, self.grid.group_size)
        return self.grid.with_widths(widths_G or (self.plan.at(layer).w,))

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


def compress(
    model, targets: Sequence[Target], batches: Sequence[Tensor], recipe: Recipe, store: Store
) -> Iterator[dict[str, QWeight]]:
    """Codes of every target, a block at a time; what is in `store` is not computed again, with the same result.

    A block that was yielded is not read again, so the caller may replace its float weights at once: memory then grows
    by one block's statistics and hidden states, not with depth. The finish trains all weights together and is the
    exception: with it, everything comes at the end and the float weights must stay until then.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    kept: dict[str, QWeight] = {}
    for done in parts(model, targets, batches, recipe, store):
        if recipe.finish_steps:
            kept |= done
        else:
            yield done
    if recipe.finish_steps:
        finished = store.read(FINISH)
        if finished is None:
            tuning = replace(FINISH_TUNING, steps=recipe.finish_steps, seed=recipe.seed)
            widths = recipe.widths if is_nested(recipe) else None
            finished = finish_model(model, batches, targets, kept, widths=widths, tuning=tuning)
            store.write(FINISH, finished)
        yield kept | finished


def parts(
    model, targets: Sequence[Target], batches: Sequence[Tensor], recipe: Recipe, store: Store
) -> Iterator[dict[str, QWeight]]:
    """The codes of every decoder block in order, then of what lies outside the blocks."""
    _, modules = find_blocks(model, targets)
    rest = outside(model, targets)
    walk = run_blocks(model, batches, targets, references=bool(recipe.block_steps))
    for block in track(walk, "quantizing", total=len(modules)):
        done = store.read(block.name)
        if done is None:
            done = quantize_block(block, recipe)
            store.write(block.name, done)
        # every width of a nested file starts from the float path; a fixed one makes up for what came before it
        block.finish({} if is_nested(recipe) else {name: q.dequantize() for name, q in done.items()})
        yield done
    if rest:
        done = store.read(OUTSIDE)
        if done is None:
            done = {t.name: rtn(t.weight_OI(model), None, recipe.grid_of(t.name, t.columns)) for t in rest}
            store.write(OUTSIDE, done)
        yield done


def is_nested(recipe: Recipe) -> bool:
    """Whether one code serves several widths."""
    return len(recipe.widths) > 1


def quantize_block(block: Block, recipe: Recipe) -> dict[str, QWeight]:
    """All targets of one block: layers in the order they run, each seeing what the earlier ones made of the input."""
    found: dict[str, QWeight] = {}
    for stage in block.stages():
        stats = {}
        if recipe.method not in DATA_FREE:
            given = {} if is_nested(recipe) else {name: q.dequantize() for name, q in found.items()}
            stats = block.stats(stage, given=given)
        for target in stage:
            grid = recipe.grid_of(target.name, target.columns)
            found[target.name] = quantize_layer(target.weight_OI(block.model), stats.get(target.name), recipe, grid)
    if recipe.block_steps:
        found = refine_block(block, found, tuning=replace(BLOCK, steps=recipe.block_steps, seed=recipe.seed))
    return found


def quantize_layer(weight_OI: Tensor, stats, recipe: Recipe, grid: Grid | None = None) -> QWeight:
    """One weight by the recipe's method on `grid` (default: the recipe's); learned rounding starts from GPTQ."""
    grid = grid or recipe.grid
    if is_nested(recipe):
        return QUANTIZERS["nested"](weight_OI, stats, grid, widths=recipe.widths, **recipe.knobs)
    method = "gptq" if recipe.method == "rounding" else recipe.method
    return QUANTIZERS[method](weight_OI, stats, grid, **recipe.knobs)


def relative_errors(weight_OI: Tensor, q: QWeight, recipe: Recipe) -> dict[str, float]:
    """Squared error of a weight at every width over its squared size, for the report."""
    whole = float(weight_OI.pow(2).sum()) or 1.0
    if recipe.plan is not None and not is_nested(recipe):
        return {PLAN: layer_loss(weight_OI, q, None) / whole}
    return {f"w{b}": layer_loss(weight_OI, q, None, b) / whole for b in recipe.widths}
