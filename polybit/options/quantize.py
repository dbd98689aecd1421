"""What `quantize` can be told, and the part of it that `plan` shares."""

# annotations are evaluated here: a record in another file that extends one of these does not know their names
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polybit.core.parts import described, listed, pick
from polybit.core.precision import FLOAT, check_width, parse_widths
from polybit.core.runtime import PolybitError
from polybit.options.checks import Device, WorkerOptions, at_least, possible_memory
from polybit.quant.table import DEFAULT_FIXED, DEFAULT_NESTED, FIXED, NESTED, QUANTIZERS, Effort

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(QUANTIZERS)]  # the command line offers what the table has

DEFAULT_WIDTHS = "8,6,5,4,3,2"
SYMMETRIC = [name for name, part in QUANTIZERS.items() if part.zero != "group"]
METHOD_HELP = (
    f"How weights become codes: {described(QUANTIZERS)} (default: {DEFAULT_NESTED} for --widths, {DEFAULT_FIXED} for "
    "--bits and --plan)."
)
ASYMMETRIC_HELP = (
    f"Store a zero point per group (default: as --plan counts; else all methods but {listed(SYMMETRIC)} do)."
)


@dataclass(frozen=True, kw_only=True)
class CodeOptions:
    """Which weights become codes, at which widths, and by which method."""

    widths: str | None = None
    """Widths one nested checkpoint serves, with commas (default: 8,6,5,4,3,2 unless --bits is given)."""
    bits: int | None = None
    """One width only: the best fixed checkpoint of that width."""
    method: Method | None = field(default=None, metadata={"help": METHOD_HELP})
    group_size: int = 64
    """Weights that share a scale: 16, 32, 64, 128, 256, or 0 = a whole row."""
    asymmetric: bool | None = field(default=None, metadata={"help": ASYMMETRIC_HELP})
    samples: int = 128
    """Windows of calibration text."""
    window: int | None = None
    """Tokens per window (default: 256 or 512 by the model's context)."""
    effort: Effort = "normal"
    """fast = no learned rounding; best = also for nested files, whose narrow widths gain much; a tenth of the speed."""
    include_embeddings: bool = False
    """Quantize the token embedding and the output head as all other layers, at every width."""
    ends: int | None = None
    """Bits of the token embedding and the output head whatever the width, 16 = float (default: 8 where the head has
    4 million weights or more, and would cost more time in float than it is worth; float for smaller ones)."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""

    def __post_init__(self) -> None:
        at_least(self, samples=1)
        if self.widths is not None and self.bits is not None:
            raise PolybitError(
                "--widths and --bits exclude each other: give --widths for one nested file, --bits for one width"
            )
        if self.method is not None:
            pick(QUANTIZERS, self.method, "--method")
        if self.is_fixed and self.method in NESTED:
            raise PolybitError(
                f"--method {self.method} makes one file for several widths: give --widths, or another --method"
            )
        if not self.is_fixed and self.method in FIXED:
            raise PolybitError(
                f"--method {self.method} makes a checkpoint of one width: give --bits, or --method {listed(NESTED)} "
                "with --widths"
            )
        found = self.stored_widths()
        if found is not None and max(found) == FLOAT:
            raise PolybitError("--bits 16 leaves the model as it is: choose 2 to 8")
        if found is not None and not self.is_fixed and len(found) < 2:
            raise PolybitError(
                f"--widths {self.widths} is a single width: use --bits {found[0]} for the best file of that width"
            )

    @property
    def is_fixed(self) -> bool:
        """Whether a file of one width, or of one plan, is meant."""
        return self.bits is not None

    def chosen_method(self) -> str:
        """The method that is meant: the one named, or the default of the kind of file."""
        return self.method or (DEFAULT_FIXED if self.is_fixed else DEFAULT_NESTED)

    def stored_widths(self) -> tuple[int, ...] | None:
        """The widths that are meant, widest first; None where a plan says them."""
        if self.bits is not None:
            return (check_width("w", self.bits),)
        return None if self.is_fixed else parse_widths(self.widths or DEFAULT_WIDTHS)


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(CodeOptions, WorkerOptions):
    """How to turn a model into one checkpoint."""

    out: Path
    """Directory of the new checkpoint."""
    plan: Path | None = None
    """JSON file with a width per layer, and per block of columns, as polybit allocate writes it: one fixed file of
    these widths, or with --widths a nested file that is also read by the plan."""
    calibration: str = "auto"
    """Text to calibrate on: a file (.txt, .jsonl, .json, .csv, .tsv, .parquet, also as .gz), a named set, a dataset id,
    or self = text the model writes itself (auto: the embedded generator for tinychat, otherwise self)."""
    mix: str | None = None
    """Mixture of texts to calibrate on, FILE=SHARE,FILE=SHARE, or the .json of polybit mix (instead of
    --calibration)."""
    rotate: bool = False
    """Turn the residual stream and the heads by Hadamard matrices folded into the weights (Llama, Mistral, Qwen2,
    Qwen3): the float model says the same, and large channels are spread over all, for narrow activations as in w4a4.
    A tied output head usually becomes a weight of its own."""
    seed: int = 0
    """Seed of everything that is drawn."""
    measure: bool = True
    """Measure the new checkpoint on held-out windows for its model card."""
    device: Device = "auto"
    """Where to compute; auto = a GPU where there is one."""
    memory: float | None = None
    """Gigabytes of memory the run should keep to: hidden states beyond a part of it go to a file, and what needs the
    whole model at once is refused or left out (default: as this machine has)."""
    overwrite: bool = False
    """Replace an existing checkpoint at --out."""
    restart: bool = False
    """Forget what an interrupted run has finished instead of going on from there."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", Path(self.out))  # a notebook gives a string
        if self.plan is not None:
            object.__setattr__(self, "plan", Path(self.plan))
        if self.plan is not None and self.bits is not None:
            raise PolybitError("--plan and --bits exclude each other: the plan says the width of every layer")
        if self.mix is not None and self.calibration != "auto":
            raise PolybitError("--mix and --calibration exclude each other: name all texts in --mix")
        possible_memory(self.memory)
        WorkerOptions.__post_init__(self)
        super().__post_init__()

    @property
    def is_fixed(self) -> bool:
        """Whether a file of one width, or of one plan, is meant."""
        return self.bits is not None or (self.plan is not None and self.widths is None)
