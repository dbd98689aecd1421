"""Which text a model is calibrated and measured on: the user's file, a named set, or text the model writes itself."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from polybit.compress.self_text import self_text
from polybit.core.runtime import PolybitError
from polybit.data.table import EMBEDDED
from polybit.data.text import read_windows
from polybit.hub.lm import longest_input

SELF = "self"  # the model writes its own text
BATCH = 4  # windows per calibration batch
HELD_OUT = 32  # windows to measure on
HELD_OUT_SEED = 1 << 40  # added to the seed of a text the model writes: held-out windows depend on nothing else
AUTO = "auto"  # conversations of the generator for the embedded model, otherwise SELF


@dataclass(frozen=True, slots=True)
class Calibration:
    """Windows of token ids: [N, T] to calibrate on, and [M, T] that calibration never saw, to measure on."""

    windows_NT: Tensor
    held_out_MT: Tensor
    source: str

    @classmethod
    def empty(cls, source: str, length: int) -> Calibration:
        """No windows, where nothing reads any; source: what would have been read."""
        none_NT = torch.empty(0, length, dtype=torch.long)
        return cls(none_NT, none_NT, source)

    def digest(self) -> str:
        """Hex digest of the tokens, for the fingerprint of a resumable run."""
        return hashlib.sha256(self.windows_NT.numpy().tobytes()).hexdigest()


def gather(
    model,
    tokenizer,
    source: str,
    *,
    samples: int,
    length: int,
    seed: int,
    held_out: int = HELD_OUT,
    embedded: bool = False,
) -> Calibration:
    """Calibration windows and held-out windows from one source, without a token in common.

    A text the model writes itself is dear and may be asked for one kind of windows alone, 0 of the other.
    """
    if source == AUTO:
        source = auto_source(embedded=embedded)
    if source == SELF:
        start, kinds = (
            tokenizer.bos_token_id,
            {"calibration": (samples, seed), "held-out": (held_out, seed + HELD_OUT_SEED)},
        )
        written = {
            kind: self_text(model, start, count=count, length=length, seed=own, kind=kind)
            for kind, (count, own) in kinds.items()
        }
        return Calibration(written["calibration"], written["held-out"], SELF)
    if samples < 1 or held_out < 1:
        raise PolybitError(f"{min(samples, held_out)} calibration samples are too few: give 1 or more")
    drawn, warnings = read_windows(source, tokenizer, length, count=samples + held_out, seed=seed)
    for warning in warnings:
        print(f"polybit: warning: {warning}", file=sys.stderr)
    if len(drawn) < 2:
        raise PolybitError(
            f"text {source!r} gives {len(drawn)} window of {length} tokens: give a longer text or a shorter --window, "
            "at least two are needed, one to calibrate and one to measure"
        )
    if len(drawn) < samples + held_out:
        held_out = max(1, min(held_out, len(drawn) // 5))
        kept = len(drawn) - held_out
        print(f"polybit: warning: text {source!r} gives only {kept} calibration windows", file=sys.stderr)
    return Calibration(drawn[:-held_out], drawn[-held_out:], source)


def auto_source(*, embedded: bool) -> str:
    """The text a model is calibrated on unless told otherwise."""
    return EMBEDDED if embedded else SELF


def window_length(model, asked: int | None) -> int:
    """Tokens per window: what was asked for if the model can read it, else 512, or 256 for a short context."""
    context = longest_input(model)
    if asked is not None:
        if asked < 2 or (context is not None and asked > context):
            raise PolybitError(
                f"--window {asked} is not possible: the model reads 2 to {context or 'any number of'} tokens"
            )
        return asked
    if context is None:
        return 512
    return min(context, 256 if context <= 1024 else 512)


def batches(windows_NT: Tensor, size: int) -> list[Tensor]:
    """Windows in batches of `size` rows, the last one shorter."""
    return list(torch.split(windows_NT, size)) if len(windows_NT) else []


def text_name(source: str) -> str:
    """How a report names the text."""
    return Path(source).name if Path(source).exists() else source
