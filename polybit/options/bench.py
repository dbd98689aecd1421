"""What `bench` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from polybit.core.precision import parse_widths
from polybit.core.runtime import PolybitError
from polybit.options.checks import at_least

WIDTHS = "8,6,5,4,3,2"
ARITHMETICS = ("int16", "int8")  # those with compiled kernels, the accurate one first


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to time and how often."""

    widths: str | None = None
    """Widths to time, with commas (default: those of MODEL, and its plans; without one 8,6,5,4,3,2)."""
    threads: int | None = None
    """Threads (default: those torch takes)."""
    rounds: int = 30
    """Interleaved rounds; medians and ratios are over them."""
    peers: bool = True
    """Time torch's kernels and, where llama_cpp can be imported, llama.cpp too."""
    shape: str = "4096x4096"
    """linear: rows x columns of the matrix."""
    batch: int = 1
    """linear: tokens multiplied at once (128 = reading a prompt)."""
    arithmetic: str = "int16,int8"
    """How inputs are rounded, with commas: int16 (error below 1e-4) and int8 (as llama.cpp does)."""
    device: Literal["cpu", "cuda"] = "cpu"
    """linear: where to run."""
    tokens: int = 16
    """generate: tokens written each time."""
    prompt: int = 64
    """generate: tokens of the prompt that is read."""
    float_model: str | None = None
    """generate: the float model to compare with, run in bf16 (default: a random one of the same sizes)."""
    gguf: str | None = None
    """generate: GGUF files for llama.cpp, with commas (default for the random model: files of the same sizes)."""
    hidden: int = 1280
    """Hidden size of the random model."""
    layers: int = 24
    """Blocks of the random model."""
    intermediate: int = 3584
    """Inner size of the random model's blocks."""
    vocabulary: int = 32000
    """Tokens the random model knows."""
    heads: int = 20
    """Attention heads of the random model."""
    kv_heads: int = 4
    """Key and value heads of the random model."""
    ends: int = 8
    """Bits of the random model's embedding and output head; 0 = those of its blocks, and llama.cpp's files then hold
    one type throughout."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""

    def __post_init__(self) -> None:
        at_least(self, threads=1, rounds=1, batch=1, tokens=1, prompt=1)
        if self.ends and not 2 <= self.ends <= 8:
            raise PolybitError(
                f"--ends {self.ends} is not possible: give 2 to 8 bits, or 0 for the width of the blocks"
            )
        if max(self.asked) > 8:
            raise PolybitError(f"--widths {self.widths} asks for more than 8 bits: choose from 8 down to 1")
        asked = self.arithmetic.split(",")
        if set(asked) - set(ARITHMETICS) or len(set(asked)) < len(asked):
            raise PolybitError(f"--arithmetic {self.arithmetic} is not known: choose from {', '.join(ARITHMETICS)}")

    @property
    def asked(self) -> tuple[int, ...]:
        """The widths to time where no model says what it has."""
        return parse_widths(self.widths or WIDTHS)

    def arithmetics(self) -> list[Literal["int16", "int8"]]:
        """How inputs are rounded, the accurate way first."""
        return [name for name in ARITHMETICS if name in self.arithmetic.split(",")]  # type: ignore[misc]

    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the one product that is timed, from `4096x4096`."""
        parts = self.shape.lower().split("x")
        if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
            raise PolybitError(f"--shape {self.shape} is no matrix: give rows x columns, as in 4096x4096")
        return int(parts[0]), int(parts[1])
