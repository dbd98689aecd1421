"""The texts a sensitivity is read on, general and of tasks, part of each kept for the proof."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from polybit.compress import text
from polybit.core.runtime import PolybitError
from polybit.data.answers import encode_task, read_task
from polybit.data.table import EMBEDDED
from polybit.hub.lm import longest_input
from polybit.measure.probe import LOGITS, ProbeText, answer_probe, text_probe

HELD_OUT = 16  # windows, and items of each task, that are kept for the proof


@dataclass(frozen=True, slots=True)
class ProbePair:
    """One text: to read sensitivities on, and another part of it for the proof; windows [B, T] to calibrate on."""

    search: ProbeText
    proof: ProbeText
    calibration: tuple[Tensor, ...] = ()


def general_probe(
    model: Any, tokenizer: Any, source: str, *, samples: int, calibrate: int, length: int, seed: int, embedded: bool
) -> ProbePair:
    """A general text: `samples` windows to read on, `calibrate` to calibrate on."""
    part = text.gather(
        model,
        tokenizer,
        source,
        samples=max(samples, calibrate),
        length=length,
        seed=seed,
        held_out=HELD_OUT,
        embedded=embedded,
    )
    words = getattr(model.config.get_text_config(), "vocab_size", 1)
    batch = max(1, min(text.BATCH, LOGITS // (length * words)))
    label = text.text_name(EMBEDDED if source == text.AUTO and embedded else part.source)
    return ProbePair(
        text_probe(label, part.windows_NT[:samples], batch=batch),
        text_probe(label, part.held_out_MT, batch=batch),
        tuple(text.batches(part.windows_NT, text.BATCH)),
    )


def task_probe(model: Any, tokenizer: Any, source: str, *, items: int, length: int, seed: int) -> ProbePair:
    """The items of a task, answers counted; beyond twice `length` tokens an item loses its beginning."""
    task = read_task(source, count=items + HELD_OUT, seed=seed)
    for warning in task.warnings:
        print(f"polybit: warning: {warning}", file=sys.stderr)
    rows = encode_task(tokenizer, task, most=min(longest_input(model) or length, 2 * length))
    if len(rows) < 2:
        raise PolybitError(
            f"task {source!r} has {len(rows)} item: at least two are needed, one to measure and one for the proof"
        )
    kept = min(HELD_OUT, max(1, len(rows) // 5))
    fill = tokenizer.pad_token_id or 0
    return ProbePair(
        answer_probe(task.name, rows[:-kept], padding=fill), answer_probe(task.name, rows[-kept:], padding=fill)
    )


def check_names(pairs: Sequence[ProbePair]) -> None:
    """Refuse a text that is given twice."""
    labels = [pair.search.name for pair in pairs]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise PolybitError(f"text {twice!r} is given twice: name each text once, as general or as a task")
