"""What `allocate` can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polybit.core.parts import described, listed
from polybit.core.precision import check_width, parse_widths
from polybit.core.runtime import PolybitError
from polybit.measure.table import SIGNALS
from polybit.options.checks import WorkerOptions, at_least, file_can_be_written
from polybit.options.loading import LoadingOptions
from polybit.quant.table import LAYERWISE, QUANTIZERS

if TYPE_CHECKING:
    How = str
    Layerwise = str
else:
    How = Literal[tuple(SIGNALS)]
    Layerwise = Literal[LAYERWISE]

AUTO_MIX = "auto"
FRONT = 12  # budgets of the front on a page


@dataclass(frozen=True, kw_only=True)
class AllocateOptions(WorkerOptions, LoadingOptions):
    """How to spend a budget of bits on the layers of a model."""

    bits: float
    """Budget: effective bits per weight of the quantized layers, scales and zero points counted, as in 3.5."""
    out: Path = Path("plan.json")
    """The plan, for polybit quantize --plan."""
    tasks: list[str] | None = None
    """Tasks that matter: files (see docs/inputs.md) of questions with answers (GSM8K, SQuAD, chat messages), or
    reading, arithmetic, dialogue, gsm8k, squad (default: the embedded ones for tinychat, otherwise none)."""
    general: list[str] | None = None
    """General text: files, named sets, dataset ids, or self (default: as polybit quantize does)."""
    beta: float = 0.7
    """Weight of the tasks against the general text, 0 to 1."""
    widths: str = "2,3,4,5,6"
    """Widths a layer may have, with commas."""
    group_size: int = 64
    """Weights that share a scale: 16, 32, 64, 128, 256, or 0 = a whole row."""
    asymmetric: bool = False
    """Count and use a zero point per group."""
    sensitivity: How = field(default="exact", metadata={"help": f"How sensitivities are read: {described(SIGNALS)}."})
    method: Layerwise = field(
        default="gptq",
        metadata={
            "help": "Quantizer of the sensitivities; gptq ranks as the finished file does, rtn is faster: "
            f"{described({name: QUANTIZERS[name] for name in LAYERWISE})}."
        },
    )
    signal: Literal["kl", "nll"] = "kl"
    """What counts as harm: divergence from the float model, or the rise of the loss on the text itself (noisier)."""
    free_groups: bool = False
    """Let layers that engines fuse (q/k/v, gate/up, w1/w3) have widths of their own."""
    pin: list[str] | None = None
    """Layers with a fixed width: PATTERN=WIDTH, as in '*.down_proj=4'."""
    refine: int = 0
    """Whole plans to measure while improving the solution by exchanges, as in 60; for files without learned rounding
    (--effort fast), which makes up for what the exchanges mend."""
    samples: int = 32
    """Windows of each general text to read sensitivities on."""
    items: int = 64
    """Questions of each task to read sensitivities on."""
    calibration_samples: int = 128
    """Windows of general text the quantizer calibrates on."""
    window: int | None = None
    """Tokens per window (default: 256 or 512 by the model's context)."""
    cache: Path | None = None
    """Where measured sensitivities are kept for later budgets (default: ~/.cache/polybit/sensitivity)."""
    mix: str | None = None
    """auto = search the shares of the general text and of the tasks, and calibrate the quantizer of the sensitivities
    on them; or the file that polybit mix --json wrote, to show its curve on the page."""
    report: Path | None = None
    """Write a page: bit map, sensitivities, front of loss against bits."""
    front: int | None = None
    """Budgets at which solved plans are measured too, for the front (default: 12 with --report, otherwise 0)."""
    seed: int = 0
    """Seed of everything that is drawn."""
    restart: bool = False
    """Measure again instead of using what an earlier run kept."""

    def __post_init__(self) -> None:
        WorkerOptions.__post_init__(self)
        LoadingOptions.__post_init__(self)
        parse_widths(self.widths)
        if not math.isfinite(self.bits) or self.bits <= 0:
            raise PolybitError(f"--bits {self.bits} is not possible: give bits per weight such as 3.5")
        if self.signal not in SIGNALS[self.sensitivity].losses:
            able = listed([name for name, part in SIGNALS.items() if self.signal in part.losses])
            reads = listed(SIGNALS[self.sensitivity].losses)
            raise PolybitError(
                f"--signal {self.signal} is not read by --sensitivity {self.sensitivity}, which reads {reads}: "
                f"choose --sensitivity {able}, or leave --signal out"
            )
        if not 0 <= self.beta <= 1:
            raise PolybitError(f"--beta {self.beta} is not possible: give 0 (general text only) to 1 (tasks only)")
        at_least(self, samples=1, items=1, calibration_samples=1, refine=0, front=0)
        for pin in self.pin or ():
            read_pin(pin)
        file_can_be_written("--out", self.out)
        file_can_be_written("--report", self.report)

    @property
    def budgets(self) -> int:
        """How many budgets of the front are measured."""
        if self.front is not None:
            return self.front
        return 0 if self.report is None else FRONT


def read_pin(pin: str) -> tuple[str, int]:
    """`*.down_proj=4` as (pattern, width)."""
    pattern, sign, width = pin.rpartition("=")
    if not sign or not pattern or not width.isdigit():
        raise PolybitError(f"--pin {pin!r} cannot be read: write PATTERN=WIDTH, as in '*.down_proj=4'")
    return pattern, check_width("w", int(width))
