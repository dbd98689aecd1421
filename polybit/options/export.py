"""What `export` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polybit.core.parts import described, listed, pick
from polybit.core.runtime import PolybitError
from polybit.data.table import EMBEDDED
from polybit.export.table import EXPORTERS, Exporter
from polybit.options.checks import at_least

if TYPE_CHECKING:
    Format = str
else:
    Format = Literal[tuple(EXPORTERS)]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is exported, in which format, and how the result is measured."""

    to: Format = field(metadata={"help": f"The format: {described(EXPORTERS)}."})
    out: Path
    """Directory of the export."""
    precision: str | None = None
    """Width, preset, or JSON file of a plan, as in w4 or plan.json (default: the widest stored)."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Float type of scales and of weights without codes (auto: bf16 for decoded weights, fp16 beside codes)."""
    exact: bool = False
    """Write layers whose scales are too small or large for 16 bits in 32, so that no weight means another code."""
    adapter: Path | None = None
    """Directory of a LoRA adapter, as `polybit train` or peft writes it, to fold into the weights."""
    text: str = EMBEDDED
    """Text on which an export that differs is measured (a file, a named set or dataset id)."""
    windows: int = 8
    """Windows of that text; 0 = compare weights alone."""
    imatrix: bool = False
    """Write an importance matrix of --text and a type per tensor beside the GGUF file, for llama-quantize."""
    eval: Path | None = None
    """JSON that `polybit eval --json` wrote, for the table of the model card (default: what `quantize` measured)."""
    push: str | None = None
    """Upload the export to this repository of the hub too, as in me/my-model-gguf."""
    private: bool = False
    """Make that repository a private one, where it is new."""
    push_dry_run: bool = False
    """Say what --push would upload, and upload nothing."""
    overwrite: bool = False
    """Replace an existing export at --out."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""

    def __post_init__(self) -> None:
        at_least(self, windows=0)
        if self.precision is not None and not self.precision.strip():
            raise PolybitError("--precision is empty: give a width such as w4, a preset, or the file of a plan")
        if self.dtype not in ("auto", *self.exporter.dtypes):
            held = listed(self.exporter.dtypes)
            raise PolybitError(f"--dtype {self.dtype} is not what --to {self.to} holds: choose {held}")
        if self.exact and not self.exporter.wide:
            able = listed(name for name, part in EXPORTERS.items() if part.wide)
            raise PolybitError(f"--exact is for --to {able}, --to {self.to} has one float type: see its --dtype")
        if (self.private or self.push_dry_run) and self.push is None:
            raise PolybitError("--private and --push-dry-run say how to push: give --push OWNER/NAME")
        if self.imatrix and not self.exporter.whole:
            raise PolybitError(f"--imatrix is for llama-quantize, and --to {self.to} is not read by it: use --to gguf")
        if self.imatrix and self.exact:
            raise PolybitError("--imatrix is for types that round again, which --exact prevents: give one of the two")
        if self.imatrix and not self.windows:
            raise PolybitError("--imatrix is measured on text: give --windows 1 or more")
        if self.adapter is not None and self.exporter.widths:
            able = ", ".join(name for name, part in EXPORTERS.items() if not part.widths)
            raise PolybitError(f"--adapter would be rounded away by the codes of --to {self.to}: use --to {able}")

    @property
    def exporter(self) -> Exporter:
        """What the table says of the format."""
        return pick(EXPORTERS, self.to, "--to")

    @property
    def float_type(self) -> str:
        """The float type asked for, or the format's own."""
        return self.exporter.dtype if self.dtype == "auto" else self.dtype
