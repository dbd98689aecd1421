"""What quantizing would give and take, told from the shapes of a model's weights before any of them is read."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from polybit.compress.loop import quantize_layer
from polybit.compress.recipe import Recipe
from polybit.core.records import LayerStats
from polybit.nn.convert import Target

STATISTICS_COPIES = 4  # Hessian, its damped copy, its factor, and one working copy live at the same time
WORKING_BYTES = 16  # of a weight while its layer is quantized
FIXED = 128 << 20  # bytes beside the weights: pieces of files, embeddings by rows, what the allocator keeps
LARGEST_TRIED = 2048  # rows and columns; a larger layer would make the preview long


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


def dry_run(targets: Sequence[Target], recipe: Recipe) -> dict[str, Any]:
    """Quantize one random layer of the commonest shape and scale its time to all layers.

    Time grows with rows * columns^2 for methods that compensate errors; learned rounding is not in it.
    """
    shapes = [(t.rows // t.experts, t.columns) for t in targets]
    rows, columns = max(set(shapes), key=shapes.count)
    rows, columns = min(rows, LARGEST_TRIED), min(columns, LARGEST_TRIED)
    draw = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(rows, columns, generator=draw) / columns**0.5
    x_TI = torch.randn(2 * columns, columns, generator=draw)
    stats = LayerStats(x_TI.T @ x_TI / len(x_TI), x_TI.abs().mean(0), len(x_TI))
    started = time.perf_counter()
    quantize_layer(weight_OI, stats, recipe)
    seconds = time.perf_counter() - started
    work = sum(t.size * t.columns for t in targets)
    return {
        "shape": [rows, columns],
        "seconds": seconds,
        "all_layers_seconds": seconds * work / (rows * columns**2),
        "learned_rounding": bool(recipe.block_steps or recipe.finish_steps),
    }
