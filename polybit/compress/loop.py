"""The one loop of compression; the whole trip of a weight can be read in this file.

    float weight ─▶ statistics of its inputs ─▶ codes ─▶ packed planes ─▶ quantized module in the model
                    VisitedBlock.stats          a quantizer     pack            convert

`compress` visits a model block by block and yields the codes of each; what becomes of them is the caller's: measure
them and let them go, or put them in the place of the weights at once (`compress_in_place`). No block is read again
after it was yielded, so memory grows by one block's statistics and hidden states, not with depth. Where the weights
come from is the source's: a model in memory, or files that lend one block at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol

from torch import Tensor, nn

from polybit.compress.blocks import VisitedBlock, find_blocks, outside, run_blocks, visit_blocks
from polybit.compress.recipe import Recipe
from polybit.compress.refine import BLOCK, finish_model, refine_block
from polybit.compress.refine import FINISH as FINISH_TUNING
from polybit.compress.refine_nested import NESTED as NESTED_TUNING
from polybit.compress.refine_nested import NESTED_BLOCK, finish_nested, refine_nested_block
from polybit.compress.rows import is_large, matrix_of, parts_of, q_rows, round_rows
from polybit.compress.settled import ROOM as SETTLED
from polybit.compress.settled import SettledOutputs
from polybit.compress.source import IN_MEMORY, WeightSource
from polybit.compress.states import Room
from polybit.core.affine import Grid, QWeight
from polybit.core.memory import return_freed
from polybit.core.plan import PLAN
from polybit.core.planes import pack, unpack
from polybit.core.records import LayerStats
from polybit.core.runtime import Advance, progress
from polybit.nn.convert import Target
from polybit.quant.problem import layer_loss
from polybit.quant.rounding import LAST
from polybit.quant.rtn import rtn
from polybit.quant.steps import KeptState, untold

OUTSIDE, FINISH = "outside the blocks", "finish"  # what a store keeps beside the decoder blocks

Codes = dict[str, QWeight]  # by target name
ExpertTokens = dict[str, list[int]]  # by module: tokens that went to each of its experts
LAYERS_SHARE = 0.9  # of a block's time, to tell progress; or of learned rounding, where there is any
LayerJob = tuple[Tensor, LayerStats | None, Recipe, Grid | None]  # the arguments of `quantize_layer`
QuantizeLayers = Callable[[Iterable[LayerJob]], Iterable[QWeight]]  # codes in the order of the jobs


class FinishedBlocks(Protocol):
    """Where finished blocks are kept, so that a killed run goes on: hub.workspace.Workspace, or Nowhere."""

    def read(self, block: str) -> Codes | None:
        """The codes of a finished block, None when it is not finished."""
        ...

    def write(self, block: str, weights: Mapping[str, QWeight]) -> None:
        """Keep the codes of a block."""
        ...

    def state(self, block: str) -> KeptState | None:
        """Where the state of long training of a block is kept until it is finished."""
        ...


class Nowhere:
    """A store that keeps nothing, for callers that need the codes once."""

    def read(self, block: str) -> None:
        """Nothing is finished."""
        return None

    def write(self, block: str, weights: Mapping[str, QWeight]) -> None:
        """Not kept."""

    def state(self, block: str) -> None:
        """Not kept."""
        return None


def compress_in_place(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Sequence[Tensor],
    recipe: Recipe,
    finished: FinishedBlocks,
    *,
    source: WeightSource = IN_MEMORY,
    room: Room | None = None,
    experts: ExpertTokens | None = None,
    quantize: QuantizeLayers | None = None,
) -> dict[str, dict[str, float]]:
    """Quantize `model` itself, each block's float weights going as its codes come.

    experts: is told how many tokens went to each expert · quantize: as in `compress`
    Returns the relative error of every target, by name and preset (`relative_errors`).
    """
    by_name = {target.name: target for target in targets}
    errors = {}
    told: dict[str, Any] = {"source": source, "room": room, "experts": experts, "quantize": quantize}
    for codes in compress(model, targets, batches, recipe, finished, **told):
        for name, q in codes.items():
            errors[name] = relative_errors(rows_of_target(model, by_name[name], source), q, recipe)
        source.place(model, {name: pack(q) for name, q in codes.items()})
    return errors


def compress(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Sequence[Tensor],
    recipe: Recipe,
    finished: FinishedBlocks | None = None,
    *,
    source: WeightSource = IN_MEMORY,
    room: Room | None = None,
    experts: ExpertTokens | None = None,
    quantize: QuantizeLayers | None = None,
) -> Iterator[Codes]:
    """Codes of every target, a block at a time, then of what lies outside the blocks.

    batches: token ids [B, T], the calibration text; may be empty for a recipe that reads none
    finished: what is found there is not computed again, with the same result (default: Nowhere)
    source: what lends the weights, a block at a time and until the next one is asked for
    room: how much of the hidden states may be in memory (default: all)
    experts: is told how many tokens went to each expert
    quantize: who makes the codes of layers that see the same (default: this process, one after another)

    A block that was yielded is not read again, so the caller may replace its float weights at once. The finish trains
    all weights together and is the exception: with it, everything comes at the end and the float weights must stay
    until then.
    """
    finished = Nowhere() if finished is None else finished
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    everything: Codes = {}
    walk = visited(model, targets, batches, recipe, source, room)
    label = "quantizing, before learned rounding" if recipe.finish_steps else "quantizing"
    with progress(label, visits(model, targets)) as step:
        for name, block in walk:
            codes = finished.read(name)
            found, told = codes is not None, Told(step, block, recipe, quantize or in_turn)
            if codes is None:
                codes = outside_codes(model, targets, recipe, source) if block is None else told.codes()
                codes = on_cpu(codes)  # from where they are packed, and as a finished block would be read
                finished.write(name, codes)
            if block is not None:
                block.finish(handed_on(codes, recipe))
                if experts is not None:
                    experts |= {key: tokens.tolist() for key, tokens in block.expert_tokens.items()}
            step(1 - told.done, found=found)
            if recipe.finish_steps:
                everything |= codes
            else:
                yield codes
    if recipe.finish_steps:
        trained = finished.read(FINISH)
        if trained is None:
            kept = finished.state(FINISH)
            trained = on_cpu(finish_codes(model, targets, batches, everything, recipe, kept))
            finished.write(FINISH, trained)
        yield everything | trained


class Told:
    """The codes of a block, which say on their way how much of it is done.

    By the work of each layer; statistics and what follows are the tenth that is left. With learned rounding by its
    steps, and layers are in that tenth.
    """

    def __init__(self, step: Advance, block: VisitedBlock | None, recipe: Recipe, quantize: QuantizeLayers) -> None:
        self.step, self.block, self.recipe, self.by = step, block, recipe, quantize
        self.done = 0.0
        self.work = sum(t.size * t.columns for t in block.targets) if block is not None else 0

    def codes(self) -> Codes:
        """`block_codes`, told as they come."""
        assert self.block is not None
        return block_codes(self.block, self.recipe, quantize=self.quantize, told=self.learned)

    def learned(self, amount: float, *, found: bool = False) -> None:
        """Gradient steps that were taken."""
        assert self.block is not None
        self.tell(LAYERS_SHARE * amount / (self.recipe.block_steps + LAST))

    def tell(self, part: float) -> None:
        """A part of the block is done."""
        self.done += part
        self.step(part)

    def quantize(self, jobs: Iterable[LayerJob]) -> Iterator[QWeight]:
        """The codes, and a step for each layer."""
        for q in self.by(jobs):
            if not self.recipe.block_steps:
                self.tell(LAYERS_SHARE * q.codes_OI.numel() * q.codes_OI.shape[1] / max(self.work, 1))
            yield q


def visited(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Sequence[Tensor],
    recipe: Recipe,
    source: WeightSource,
    room: Room | None,
) -> Iterator[tuple[str, VisitedBlock | None]]:
    """(name, block) of every decoder block in order, on the calibration text where the recipe reads it; the targets
    outside the blocks come last and as one, with no block."""
    if recipe.reads_text:
        references = bool(recipe.block_steps)
        blocks = run_blocks(model, batches, targets, references=references, source=source, room=room)
    else:
        blocks = visit_blocks(model, targets, source=source)
    rest = [(OUTSIDE, None)] if outside(model, targets) else []
    yield from chain(((block.name, block) for block in blocks), rest)


def visits(model: nn.Module, targets: Sequence[Target]) -> int:
    """How many there will be."""
    return len(find_blocks(model, targets)[1]) + bool(outside(model, targets))


def block_codes(
    block: VisitedBlock, recipe: Recipe, *, quantize: QuantizeLayers | None = None, told: Advance = untold
) -> Codes:
    """All targets of one block: layers in the order they run, each seeing what the earlier ones made of the input.

    Those of a nested file see what the float block makes of it, all in one pass. quantize: who makes the codes of
    layers that see the same (default: `quantize_layer`, one after another) · told: hears of learned rounding.
    """
    quantize = quantize or in_turn
    codes: Codes = {}
    seen: dict[str, LayerStats] = {}
    at_once = recipe.is_nested and recipe.layerwise.needs_stats and not recipe.block_steps
    everything = block.stats_and_outputs() if at_once else {}
    if recipe.layerwise.needs_stats and not recipe.is_nested and not recipe.block_steps:
        block.settled = SettledOutputs(block.module, block.name, block.targets, most=settled_bytes(block.room))
    stages = block.stages()
    for stage in [tuple(chain.from_iterable(stages))] if at_once else stages:
        stats = everything
        if recipe.layerwise.needs_stats and not at_once:
            stats = block.stats(stage, given=handed_on(codes, recipe))
            seen |= stats if recipe.is_nested else {}
        jobs = ((t.weight_OI(block.model), stats.get(t.name), recipe, recipe.grid_of(t.name, t.columns)) for t in stage)
        codes |= zip((target.name for target in stage), quantize(jobs), strict=True)
        return_freed()
    if recipe.block_steps:
        steps: dict[str, Any] = {"steps": recipe.block_steps, "seed": recipe.seed}
        if recipe.is_nested:
            tuning = replace(NESTED_BLOCK, **steps)
            return refine_nested_block(block, codes, seen, widths=recipe.widths, tuning=tuning, told=told)
        codes = refine_block(block, codes, tuning=replace(BLOCK, **steps), told=told)
    return codes


def settled_bytes(room: Room | None) -> int:
    """How much of what settled layers gave may be kept; with a room for hidden states a part of its size."""
    return SETTLED if room is None or room.limit is None else min(SETTLED, room.limit // 8)


def quantize_layer(weight_OI: Tensor, stats: LayerStats | None, recipe: Recipe, grid: Grid | None = None) -> QWeight:
    """One weight by the recipe's method on `grid` (default: the recipe's), or by what a learned one starts from."""
    widths = {"widths": recipe.widths} if recipe.is_nested else {}
    return recipe.layerwise(weight_OI, stats, grid or recipe.grid, **widths, **recipe.knobs)


def in_turn(jobs: Iterable[LayerJob]) -> Iterator[QWeight]:
    """The codes of layers, one after another."""
    for job in jobs:
        yield quantize_layer(*job)


def handed_on(codes: Codes, recipe: Recipe) -> dict[str, Tensor]:
    """The weights later layers see in place of float ones.

    Every width of a nested file starts from the float path; a fixed one makes up for what came before it.
    """
    return {} if recipe.is_nested else {name: q.dequantize() for name, q in codes.items()}


def on_cpu(codes: Codes) -> Codes:
    """Codes in main memory, wherever they were made."""
    return {name: q.to("cpu") for name, q in codes.items()}


def outside_codes(
    model: nn.Module, targets: Sequence[Target], recipe: Recipe, source: WeightSource = IN_MEMORY
) -> Codes:
    """The embedding and the head: rounded to nearest, since no statistics are taken there."""
    found = {}
    for target in outside(model, targets):
        grid = recipe.grid_of(target.name, target.columns)
        matrix = matrix_of(target, source)
        if matrix is not None and is_large(matrix):
            found[target.name] = unpack(round_rows(matrix, grid))
        else:
            with source.lend(target.module_name):
                found[target.name] = rtn(target.weight_OI(model), None, grid)
    return found


def finish_codes(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Sequence[Tensor],
    codes: Codes,
    recipe: Recipe,
    kept: KeptState | None = None,
) -> Codes:
    """The codes after gradient steps over the whole model; the start where they did not help."""
    told: dict[str, Any] = {"steps": recipe.finish_steps, "seed": recipe.seed}
    if recipe.is_nested:
        tuning = replace(NESTED_TUNING, **told)
        return finish_nested(model, batches, targets, codes, widths=recipe.widths, tuning=tuning, kept=kept)
    return finish_model(model, batches, targets, codes, tuning=replace(FINISH_TUNING, **told), kept=kept)


def rows_of_target(model: nn.Module, target: Target, source: WeightSource) -> Iterator[tuple[slice, Tensor]]:
    """The float weight of a target in blocks of rows."""
    matrix = matrix_of(target, source) if target.parameter(model).is_meta else None
    if matrix is not None:
        yield from ((part, matrix.rows(part.start, part.stop)) for part in parts_of(target.rows, target.columns))
        return
    with source.lend(target.module_name):
        weight_OI = target.weight_OI(model)
        yield from ((part, weight_OI[part]) for part in parts_of(target.rows, target.columns))


def relative_errors(rows: Iterable[tuple[slice, Tensor]], q: QWeight, recipe: Recipe) -> dict[str, float]:
    """Squared error of a weight at every width over its squared size, for the report."""
    fixed = recipe.plan is not None and not recipe.is_nested
    widths = {PLAN: None} if fixed else {f"w{b}": b for b in recipe.widths}
    whole, lost = 0.0, dict.fromkeys(widths, 0.0)
    for part, weight_PI in ((part, rows_PI.cpu()) for part, rows_PI in rows):
        whole += float(weight_PI.pow(2).sum())
        cut = q_rows(q, part)
        for name, width in widths.items():
            lost[name] += layer_loss(weight_PI, cut, None, width)
    return {name: value / (whole or 1.0) for name, value in lost.items()}
