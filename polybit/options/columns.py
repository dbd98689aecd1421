"""What `columns` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polybit.core.parts import described
from polybit.core.runtime import PolybitError
from polybit.options.checks import at_least, file_can_be_written
from polybit.options.loading import LoadingOptions
from polybit.quant.table import LAYERWISE, QUANTIZERS

if TYPE_CHECKING:
    Layerwise = str
else:
    Layerwise = Literal[LAYERWISE]


@dataclass(frozen=True, kw_only=True)
class ColumnsOptions(LoadingOptions):
    """How to search widths for blocks of columns inside the layers of a model."""

    out: Path
    """JSON file of the new plan."""
    bits: float | None = None
    """Mean bits of every layer; a fraction such as 3.5 is reached by counts of blocks."""
    plan: Path | None = None
    """A plan with a width per layer, whose means are kept (instead of --bits)."""
    block: int = 128
    """Columns that share a width; smaller for small models, as in 32."""
    group_size: int = 64
    """Weights that share a scale; must divide the block, and be given to polybit quantize too."""
    search: Literal["ranked", "spend"] = "ranked"
    """ranked = exchange the most and the least salient blocks; spend = measured losses, spent exactly."""
    method: Layerwise = field(
        default="gptq",
        metadata={
            "help": "Quantizer that tries the widths and checks the plan: "
            f"{described({name: QUANTIZERS[name] for name in LAYERWISE})}."
        },
    )
    sort: Path | None = None
    """Write the model to this directory with the hidden units of its feed-forwards sorted by salience, so that blocks
    differ; the plan is then for that model, which computes the same."""
    calibration: str = "auto"
    """Text to calibrate on, as for polybit quantize."""
    mix: str | None = None
    """Mixture of texts to calibrate on, FILE=SHARE,FILE=SHARE, or the .json of polybit mix."""
    samples: int = 64
    """Windows of calibration text."""
    window: int | None = None
    """Tokens per window (default: 256 or 512 by the model's context)."""
    seed: int = 0
    """Seed of what is drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, samples=1)
        file_can_be_written("--out", self.out)
        if (self.bits is None) == (self.plan is None):
            raise PolybitError("give either --bits, the mean of every layer, or --plan, a width per layer")
        if self.bits is not None and not 2 <= self.bits <= 8:
            raise PolybitError(f"--bits {self.bits:g} is not possible: give a mean from 2 to 8, as in 3.5")
        if self.block < 1 or not self.group_size or self.block % self.group_size:
            raise PolybitError(
                f"--block {self.block} is no multiple of --group-size {self.group_size}: "
                "give for example --block 64 --group-size 32"
            )
