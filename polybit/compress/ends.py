"""The token embedding and the output head: stored at a width of their own and read at it whatever the blocks' width."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from polybit.compress.rows import is_large, matrix_of, round_rows
from polybit.compress.source import IN_MEMORY, WeightSource
from polybit.core.affine import Grid
from polybit.core.plan import Plan
from polybit.core.planes import Planes, pack, unpack
from polybit.core.precision import FLOAT, Precision
from polybit.core.runtime import PolybitError
from polybit.nn.convert import Target, convert, targets
from polybit.nn.linear import QuantWeight
from polybit.nn.switch import presets, set_presets
from polybit.quant.rtn import rtn

BITS = 8  # at which rounding the ends costs less than anything else that is measured (docs/results/rounded-inputs.md)
Keep = Callable[[str, Mapping[str, Planes]], None]
LARGE = 1 << 22  # weights of a head from which a float one costs more time per token than it is worth


def end_bits(model: Any, asked: int | None) -> int:
    """Bits of the ends: what was asked for, else 8 for a large head and float for a small one."""
    if asked is not None:
        if asked != FLOAT and not 2 <= asked <= 8:
            raise PolybitError(f"--ends {asked} is not possible: give 2 to 8 bits, or 16 to leave them in float")
        return asked
    return BITS if max((target.size for target in end_targets(model)), default=0) >= LARGE else FLOAT


def end_targets(model: Any) -> list[Target]:
    """The embedding and the head, once when they are tied."""
    return [t for t in targets(model, include_embeddings=True) if t.kind in ("embedding", "head")]


def quantize_ends(
    model: Any, bits: int, group_size: int, *, source: WeightSource = IN_MEMORY, keep: Keep | None = None
) -> list[str]:
    """Round the ends of `model` in place, to the nearest and with a zero point; their names.

    source: what lends their weights, large ones by rows
    keep: called with what is stored of each, where the model itself does not hold it
    """
    if bits == FLOAT:
        return []
    chosen = end_targets(model)
    for target in chosen:
        planes = rounded(model, target, Grid(bits, group_size, "group"), source)
        if keep is not None:
            keep(target.name, {target.name: planes})
        source.place(model, {target.name: planes})
    return [target.name for target in chosen]


def rounded(model: Any, target: Target, grid: Grid, source: WeightSource) -> Planes:
    """One end as it is stored."""
    matrix = matrix_of(target, source)
    if matrix is not None and is_large(matrix):
        return round_rows(matrix, grid)
    with source.lend(target.module_name):
        return pack(rtn(target.weight_OI(model).cpu(), None, grid))


def hold_ends(model: Any, names: list[str], bits: int, widths: tuple[int, ...]) -> None:
    """Presets `w8`, `w4`, ... that read the blocks at that width and the ends at their own; others get them too."""
    if not names:
        return
    held = {name: Precision(w=bits) for name in names}
    plans = {f"w{width}": Plan(Precision(w=width), held) for width in widths}
    for name, plan in presets(model).items():
        plans[name] = Plan(plan.default, {**plan.layers, **held}, plan.columns)
    set_presets(model, plans)


@dataclass(frozen=True)
class HeldEnds:
    """The ends of a checkpoint that reads them at one width whatever its preset.

    planes: what is stored of each, by name; none where the ends are float · bits: the width they are read at
    """

    planes: Mapping[str, Planes]
    bits: int

    @torch.no_grad()
    def into_float(self, model: Any) -> None:
        """Give a float model, in place, the numbers that are read, so that what is trained between them knows them."""
        for target in end_targets(model):
            if target.name in self.planes:
                parameter = target.parameter(model)
                parameter.copy_(unpack(self.planes[target.name], self.bits).dequantize().to(parameter))

    def into_checkpoint(self, model: Any, widths: tuple[int, ...], plans: Mapping[str, Plan]) -> None:
        """Put the same bytes, in place, into a quantized model with float ends; widths, plans: its presets."""
        convert(model, self.planes)
        set_presets(model, plans)  # after every layer is in its place
        hold_ends(model, list(self.planes), self.bits, widths)


def held_ends(quantized: Any, like: Any) -> HeldEnds:
    """The ends that `quantized` holds at one width; like: a float model of the same shape.

    Ends that are read at every preset's own width (--include-embeddings) are none of these.
    """
    names = {target.name for target in end_targets(like)}
    found = {n: m.planes for n, m in quantized.named_modules() if n in names and isinstance(m, QuantWeight)}
    read = {plan.at(name).w for plan in presets(quantized).values() for name in found}
    return HeldEnds(found, read.pop()) if len(read) == 1 else HeldEnds({}, FLOAT)
