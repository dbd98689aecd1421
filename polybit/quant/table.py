"""The quantizers by name, and all that anybody else needs to know of each; a new one is a file and a line below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from polybit.core.parts import load

if TYPE_CHECKING:  # the table is read where no torch is loaded
    from torch import Tensor

    from polybit.core.affine import Grid, QWeight, ZeroKind
    from polybit.core.records import LayerStats

Effort = Literal["fast", "normal", "best"]  # how much learning a user allows, least first


@dataclass(frozen=True, slots=True)
class Learned:
    """Gradient steps a method goes on with after its layer-wise codes.

    steps: over the whole model · block_steps: block by block, where the whole model does not fit in memory (0 = then
    none) · effort: the least `--effort` that takes them.
    """

    steps: int
    block_steps: int
    effort: Effort


@dataclass(frozen=True, slots=True)
class Quantizer:
    """One way from a float weight to codes: call it as `(weight_OI, stats, grid, **knobs) -> QWeight`.

    function: dotted path of that function · summary: half a sentence for `--help` · needs_stats: whether it asks
    calibration for LayerStats · zero: the kind of zero point it takes unless told otherwise · nested: one code for
    several widths (it also takes `widths`), or a file of one width · learned: the gradient steps that follow · start:
    the quantizer whose codes they start from, where `function` is learned itself.
    """

    function: str
    summary: str
    needs_stats: bool = True
    zero: ZeroKind = "group"
    nested: bool = False
    learned: Learned | None = None
    start: str | None = None

    def __call__(self, weight_OI: Tensor, stats: LayerStats | None, grid: Grid, **knobs: Any) -> QWeight:
        """Codes, scales and zero points of one weight."""
        return load(self.function)(weight_OI, stats, grid, **knobs)


QUANTIZERS: dict[str, Quantizer] = {
    "nested": Quantizer(
        "polybit.quant.nested:nested",
        "all widths optimised together in one code",
        nested=True,
        learned=Learned(260, 200, "best"),  # many times the seconds; wide widths lose a little by it
    ),
    "rounding": Quantizer(
        "polybit.quant.rounding:rounding",
        "learned rounding, the best of one width",
        zero="centre",  # gains nothing from a zero point and would pay its bits
        learned=Learned(130, 200, "normal"),
        start="gptq",
    ),
    "gptq": Quantizer("polybit.quant.gptq:gptq", "errors made up for column by column, then descent"),
    "awq": Quantizer("polybit.quant.awq:awq", "columns scaled by the size of their inputs"),
    "hqq": Quantizer("polybit.quant.hqq:hqq", "robust zero points, needs no text", needs_stats=False),
    "rtn": Quantizer("polybit.quant.rtn:rtn", "rounding to nearest, needs no text", needs_stats=False),
}
NESTED = tuple(name for name, part in QUANTIZERS.items() if part.nested)  # make files of several widths
FIXED = tuple(name for name, part in QUANTIZERS.items() if not part.nested)  # make files of one width
LAYERWISE = tuple(name for name in FIXED if QUANTIZERS[name].start is None)  # and look at one layer at a time
DEFAULT_NESTED, DEFAULT_FIXED = NESTED[0], FIXED[0]  # taken where no method is named: the first line of each kind
