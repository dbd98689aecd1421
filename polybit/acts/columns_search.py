"""Offsets of the blocks of columns of each layer: what they do to the layer's output, on the float model's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from polybit.allocate.columns import Split, base_width, block_lengths, ranked_offsets, search_ranked, spend
from polybit.compress.blocks import find_blocks, outside, run_blocks
from polybit.compress.recipe import zero_of
from polybit.core.affine import Grid, QWeight
from polybit.core.plan import ColumnWidths
from polybit.core.records import LayerStats
from polybit.core.runtime import track
from polybit.measure.quantizing import knobs_of
from polybit.nn.convert import Target
from polybit.quant.problem import layer_loss
from polybit.quant.salience import block_losses, column_salience, over_blocks
from polybit.quant.table import QUANTIZERS

SEARCH_ROWS = 256  # output rows that stand for the whole layer while offsets are searched
WORTH = 0.97  # an exchange of blocks must lower the layer's loss to this share of it


@dataclass(frozen=True, slots=True)
class ColumnSearch:
    """How offsets are searched: columns of a block, weights that share a scale, "ranked" or "spend", the quantizer,
    whether every group stores a zero point (None: as the quantizer does)."""

    block: int
    group_size: int
    how: str = "ranked"
    method: str = "gptq"
    asymmetric: bool | None = None

    def codes(self, rows_RI: Tensor, stats: LayerStats, base: int, widths: Sequence[int]) -> QWeight:
        """Some rows of a layer with a width per block, quantized without descent where the method has any."""
        part = QUANTIZERS[self.method]
        plain = Grid(base, self.group_size, zero_of(part, self.asymmetric))
        offsets = tuple(b - base for b in widths)
        widths_G = ColumnWidths(self.block, offsets).group_widths(base, rows_RI.shape[1], self.group_size)
        knobs = knobs_of(self.method, descent_sweeps=0)
        return part(rows_RI, stats if part.needs_stats else None, plain.with_widths(widths_G), **knobs)


def search_layers(
    model: Any,
    chosen: Sequence[Target],
    batches: Sequence[Tensor],
    means: Mapping[str, float],
    asked: ColumnSearch,
    **where: Any,
) -> dict[str, Split]:
    """Offsets of every layer, a decoder block at a time, on the float model's inputs; where: as for `run_blocks`."""
    rest = {target.name for target in outside(model, chosen)}
    _, modules = find_blocks(model, chosen)
    splits = {}
    for block in track(run_blocks(model, batches, chosen, references=False, **where), "columns", total=len(modules)):
        stats = block.stats()
        for target in block.targets:
            if target.name not in rest:
                weight_OI = target.weight_OI(model)
                splits[target.name] = search_layer(weight_OI, stats[target.name], means[target.name], asked)
        block.finish()
    return splits


def search_layer(weight_OI: Tensor, stats: LayerStats, mean: float, asked: ColumnSearch) -> Split:
    """Offsets of one layer: least loss of its output, on evenly spaced rows."""
    rows_RI = weight_OI[:: -(-len(weight_OI) // SEARCH_ROWS)]
    lengths = block_lengths(weight_OI.shape[1], asked.block)
    base = base_width(mean)

    def harm(offsets: tuple[int, ...]) -> float:
        return layer_loss(rows_RI, asked.codes(rows_RI, stats, base, [base + offset for offset in offsets]), stats)

    per_column = over_blocks(column_salience(rows_RI, stats), asked.block) / over_blocks(
        weight_OI.new_ones(weight_OI.shape[1]), asked.block
    )
    found = search_ranked(per_column, lengths, mean, harm)
    start = found.tried[0][1]  # i = 0: nothing exchanged
    if asked.how == "spend":
        widths = [b for b in range(base - 1, base + 3) if 1 <= b <= 8]
        codes = {b: asked.codes(rows_RI, stats, base, [b] * len(lengths)) for b in widths if b > 1 or len(lengths) > 1}
        losses = block_losses(rows_RI, codes, stats, asked.block)
        offsets = tuple(b - base for b in spend(losses.tolist(), widths, lengths, mean))
        spent = harm(offsets)
        found = min(found, Split(offsets, spent, (*found.tried, ("spend", spent))), key=lambda s: s.harm)
    if found.harm <= WORTH * start:
        return found
    unchanged = ranked_offsets(per_column.tolist(), lengths, mean, 0)
    assert unchanged is not None
    return replace(found, offsets=unchanged, harm=start)
