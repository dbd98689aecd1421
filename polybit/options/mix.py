"""What `mix` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polybit.core.parts import described
from polybit.core.precision import check_width
from polybit.core.runtime import PolybitError
from polybit.measure.table import CRITERIA
from polybit.options.checks import WorkerOptions, at_least, file_can_be_written
from polybit.options.loading import LoadingOptions
from polybit.quant.table import FIXED, QUANTIZERS

if TYPE_CHECKING:
    Criterion = str
    Fixed = str
else:
    Criterion = Literal[tuple(CRITERIA)]
    Fixed = Literal[FIXED]


@dataclass(frozen=True, kw_only=True)
class MixOptions(WorkerOptions, LoadingOptions):
    """How to look for the mixture of texts a model is best calibrated on."""

    general: list[str]
    """General text: files (see docs/inputs.md), named sets or dataset ids."""
    tasks: list[str]
    """Text of the tasks that matter: files (see docs/inputs.md), named sets or dataset ids."""
    criterion: Criterion = field(
        default="family", metadata={"help": f"What makes a mixture good: {described(CRITERIA)}."}
    )
    normalise: Literal["size", "layer"] = "size"
    """How layers are made comparable; layer = every layer counts alike, for models with massive activations."""
    step: float | None = None
    """Distance of neighbouring shares (default: 0.05 for two texts, 0.1 for three or four)."""
    samples: int = 64
    """Windows of each text to look at, and of calibration text with --verify."""
    window: int | None = None
    """Tokens per window (default: 256 or 512 by the model's context)."""
    verify: bool = False
    """Quantize at a few mixtures, measure every text, and say what the forward-only choice is worth."""
    bits: int = 3
    """Width of --verify."""
    method: Fixed = field(
        default="gptq",
        metadata={"help": f"Quantizer of --verify: {described({name: QUANTIZERS[name] for name in FIXED})}."},
    )
    group_size: int = 32
    """Weights that share a scale, for --verify."""
    seeds: int = 3
    """Calibration draws of --verify."""
    seed: int = 0
    """First seed."""
    restart: bool = False
    """Forget what an interrupted --verify has finished."""
    json: Path | None = None
    """Write the search, and the measured table, there; --verify keeps what it has finished beside it."""

    def __post_init__(self) -> None:
        WorkerOptions.__post_init__(self)
        LoadingOptions.__post_init__(self)
        check_width("w", self.bits)
        names = [*self.general, *self.tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise PolybitError(f"text {twice[0]!r} is given twice: name each text once, as general or as a task")
        at_least(self, samples=1, seeds=1)
        file_can_be_written("--json", self.json)
