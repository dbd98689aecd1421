"""Smaller batches where a GPU's memory is used up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from polybit.core.runtime import PolybitError

T = TypeVar("T")


class Batched(Protocol):
    """What says how large batches may be: rows x length, and numbers in one tensor of logits."""

    batch_tokens: int
    batch_logits: int


def in_halves(call: Callable[[Any], list[T]], rows: Any, lm: Batched) -> list[T]:
    """What `call` gives for rows (a tensor or a list of them); where it runs out of a GPU's memory, for each half.

    lm: whose later batches are made smaller too
    Raises PolybitError where a single row is too much.
    """
    try:
        return call(rows)
    except torch.OutOfMemoryError:
        if len(rows) < 2:
            raise PolybitError(
                "the GPU's memory is used up by a single row of tokens: give --device cpu, or shorter texts"
            ) from None
    torch.cuda.empty_cache()  # after the exception is gone, which held what it was about
    lm.batch_tokens, lm.batch_logits = max(1, lm.batch_tokens // 2), max(1, lm.batch_logits // 2)
    middle = len(rows) // 2
    return [*in_halves(call, rows[:middle], lm), *in_halves(call, rows[middle:], lm)]
