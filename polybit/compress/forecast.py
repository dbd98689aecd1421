"""What quantizing would give and take, told from the shapes of a model's weights before any of them is read."""

from __future__ import annotations

import hashlib
import resource
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from polybit.compress.blocks import VisitedBlock
from polybit.compress.forecast_steps import Seconds, TimedSteps, learning_bytes, learning_seconds, time_steps
from polybit.compress.loop import (
    LayerJob,
    block_codes,
    handed_on,
    quantize_layer,
    relative_errors,
    rows_of_target,
    visited,
)
from polybit.compress.recipe import Recipe
from polybit.compress.refine_nested import ROWS
from polybit.compress.text import BATCH
from polybit.core.affine import Grid, QWeight
from polybit.core.memory import return_large
from polybit.core.planes import pack
from polybit.hub.lent import LentModel
from polybit.hub.workspace import Workspace
from polybit.nn.convert import Target
from polybit.quant.rtn import rtn

STATISTICS_COPIES = 4  # Hessian, its damped copy, its factor, and one working copy live at the same time
FLOAT_BYTES = 4
HASHED, ENDS_TRIED = 1 << 26, 1 << 22  # bytes and weights that are tried
MOST_TRIED, PASS_SECONDS = 32, 0.5  # batches a block is timed on at most, and seconds a pass of them may take
WORKING_BYTES = 16  # of a weight while its layer is quantized
FIXED = 128 << 20  # bytes beside the weights: pieces of files, embeddings by rows, what the allocator keeps


class Stopwatch:
    """Adds up wall and CPU seconds of the bodies it is entered for."""

    def __init__(self) -> None:
        self.seconds: Seconds = (0.0, 0.0)

    def __enter__(self) -> Stopwatch:
        self.began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        now = time.perf_counter(), time.process_time()
        self.seconds = (self.seconds[0] + now[0] - self.began[0], self.seconds[1] + now[1] - self.began[1])


def expected_sizes(targets: Sequence[Target], recipe: Recipe) -> dict[str, dict[str, float]]:
    """Effective bits per weight and bytes read at each width, all quantized layers together."""
    grid = recipe.grid
    weights = max(sum(t.size for t in targets), 1)
    zero_bits = grid.bits if grid.zero == "group" else 0
    found = {}
    for width in recipe.widths:
        bits = read = 0.0
        for t in targets:
            groups, rows, columns = grid.groups(t.columns), -(-t.rows // 16) * 16, -(-t.columns // 32) * 32
            per_row = (16 + zero_bits) * groups
            bits += t.rows * (width * t.columns + per_row)
            read += rows * (width * columns + (16 + (8 if zero_bits else 0)) * groups) / 8
        found[f"w{width}"] = {"bits_per_weight": bits / weights, "bytes": read}
    return found


def expected_memory(
    parameters: int, targets: Sequence[Target], *, tokens: int, hidden: int, blocks: int
) -> dict[str, int]:
    """Bytes: the float model as a whole (float32), what quantizing it block by block takes, and the model at rest.

    parameters: of the whole model
    tokens: of calibration text
    hidden: size of the hidden state
    blocks: how many decoder blocks there are
    """
    widest = max((t.columns for t in targets), default=0)
    largest = max((t.size for t in targets), default=0)
    block = 4 * sum(t.size for t in targets if t.kind not in ("embedding", "head")) // max(blocks, 1)
    states = 4 * tokens * hidden
    return {
        "float_model": 4 * parameters,
        "quantizing": 2 * block + STATISTICS_COPIES * 8 * widest**2 + WORKING_BYTES * min(largest, block // 4) + FIXED,
        "states": states,
        "float_part_at_rest": 4 * (parameters - sum(t.size for t in targets)),
    }


@dataclass(frozen=True, slots=True)
class TimedBlock:
    """One block on its whole trip, seconds (wall, CPU) by what they grow with.

    batches: of calibration text it was tried on · codes: with rows * columns^2 of its weights · passes: with tokens and
    weights · kept: with weights (errors, packing, files) · steps: of learned rounding, where it has any
    """

    name: str
    batches: int
    codes: Seconds
    passes: Seconds
    kept: Seconds
    steps: TimedSteps | None = None


def time_block(source: LentModel, targets: Sequence[Target], batches: Sequence[Tensor], recipe: Recipe) -> TimedBlock:
    """Quantize the first decoder block of a model as `compress_in_place` does, and let it go; of learned rounding a few
    steps."""
    return_large()
    learns, recipe = recipe, replace(recipe, block_steps=0, finish_steps=0)
    codes, passes, kept = Stopwatch(), Stopwatch(), Stopwatch()
    steps = None

    def quantize(jobs: Iterable[LayerJob]) -> Iterator[QWeight]:
        for job in jobs:
            with codes:
                q = quantize_layer(*job)
            yield q

    by_name = {target.name: target for target in targets}
    for parameter in source.model.parameters():
        parameter.requires_grad_(False)
    with first_block(source, targets, batches, recipe) as block, TemporaryDirectory() as folder:
        tried = shortened(block)
        with passes:
            found = block_codes(block, recipe, quantize=quantize)
            block.finish(handed_on(found, recipe))
        with kept:
            for key, q in found.items():
                relative_errors(rows_of_target(source.model, by_name[key], source), q, recipe)
            with closing(Workspace(Path(folder) / "block", {})) as store:
                store.write(block.name, found)
    if learns.block_steps or learns.finish_steps:
        with first_block(source, targets, [batches[0][: rows_of_step(learns)]], recipe) as block:
            steps = time_steps(block, found, vocabulary_of(source), learns)
    return TimedBlock(block.name, tried, codes.seconds, minus(passes.seconds, codes.seconds), kept.seconds, steps)


@contextmanager
def first_block(
    source: LentModel, targets: Sequence[Target], batches: Sequence[Tensor], recipe: Recipe
) -> Iterator[VisitedBlock]:
    """The first decoder block and the text on its way to it, while its weights are lent."""
    walk = visited(source.model, targets, batches, recipe, source, None)
    with closing(walk):  # type: ignore[type-var]
        _, block = next(walk)
        assert block is not None
        yield block


def rows_of_step(recipe: Recipe) -> int:
    """Windows that a step of learned rounding reads."""
    return ROWS if recipe.is_nested and recipe.finish_steps else BATCH


def vocabulary_of(source: LentModel) -> int:
    """Tokens the model knows."""
    return int(source.model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]


def shortened(block: VisitedBlock) -> int:
    """Leave the block so many batches that a pass takes about PASS_SECONDS, and no fewer than two; how many."""
    if not block.inputs:
        return 1
    with torch.no_grad():
        block.forward({}, 0)  # whatever is loaded or laid out at first
        watch = Stopwatch()
        with watch:
            block.forward({}, 0)
    tried = min(len(block.inputs), max(2, int(PASS_SECONDS / max(watch.seconds[0], 1e-9))))
    block.inputs, block.references = list(block.inputs)[:tried], list(block.references)[:tried]
    return tried


def foretell_seconds(
    source: LentModel,
    targets: Sequence[Target],
    held: Sequence[Target],
    recipe: Recipe,
    *,
    windows: int,
    length: int,
    start: Seconds,
) -> dict[str, Any]:
    """Seconds (wall and CPU) that `quantize` will take, from one timed block of drawn weights.

    held: the ends that become codes · windows, length: of calibration text · start: what loading libraries took. Not in
    it: text the model writes itself, measuring the result. learning_bytes: what learning over the whole model takes
    beside its float weights.
    """
    inside = [t for t in targets if t.kind not in ("embedding", "head")]
    given = -(-windows // BATCH)
    ids_NT = torch.randint(
        vocabulary_of(source), (BATCH * min(given, MOST_TRIED), length), generator=torch.Generator().manual_seed(0)
    )
    timed = time_block(source, targets, list(ids_NT.split(BATCH)), recipe)
    of_block = [t for t in inside if t.name.startswith(f"{timed.name}.")]
    weights = sum(t.size for t in inside) / sum(t.size for t in of_block)
    work = sum(t.size * t.columns for t in inside) / sum(t.size * t.columns for t in of_block)
    parameters = sum(p.numel() for p in source.model.parameters())
    parts = {
        "start": start,
        "digest": times(hashing(), FLOAT_BYTES * parameters / HASHED),
        "codes": times(timed.codes, work),
        "passes": times(timed.passes, weights * given / timed.batches),
        "kept": times(timed.kept, weights),
        "ends": times(rounding_of_ends(recipe), sum(t.size for t in held) / ENDS_TRIED),
    }
    if timed.steps is not None:
        read = -(-windows // rows_of_step(recipe))
        parts["learning"] = learning_seconds(timed.steps, recipe, blocks=weights, batches=read)
    wall, cpu = (sum(each[i] for each in parts.values()) for i in (0, 1))
    return {
        "block": timed.name,
        "blocks": weights,
        "seconds": wall,
        "cpu_seconds": cpu,
        "parts": {name: {"seconds": each[0], "cpu_seconds": each[1]} for name, each in parts.items()},
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "learning_bytes": 0
        if timed.steps is None
        else learning_bytes(timed.steps, recipe, weights=sum(t.size for t in targets), blocks=weights, batches=read),
    }


def hashing() -> Seconds:
    """Of the digest of HASHED bytes."""
    watch, values = Stopwatch(), bytes(HASHED)
    with watch:
        hashlib.sha256(values)
    return watch.seconds


def rounding_of_ends(recipe: Recipe) -> Seconds:
    """Of rounding ENDS_TRIED weights of an end and keeping them."""
    watch = Stopwatch()
    weight_OI = torch.randn(ENDS_TRIED // 1024, 1024, generator=torch.Generator().manual_seed(0))
    with watch:
        pack(rtn(weight_OI, None, Grid(8, recipe.grid.group_size, "group")))
    return watch.seconds


def minus(one: Seconds, other: Seconds) -> Seconds:
    """The difference."""
    return one[0] - other[0], one[1] - other[1]


def times(seconds: Seconds, factor: float) -> Seconds:
    """The product."""
    return factor * seconds[0], factor * seconds[1]
