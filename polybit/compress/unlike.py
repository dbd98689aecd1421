"""The refusal of an architecture whose blocks do not simply follow one another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from polybit.core.runtime import PolybitError


class Captured(Exception):
    """Raised to leave the model's forward once the last block was called."""


def not_in_a_row(model: nn.Module, what: str) -> PolybitError:
    """The sentence, with what was seen."""
    return PolybitError(
        f"{type(model).__name__} does not hand hidden states from each of its blocks to the next ({what}): "
        "polybit cannot calibrate it, choose --method rtn, which reads no text"
    )


@contextmanager
def in_words(model: nn.Module) -> Iterator[None]:
    """Whatever the model raises while its blocks are passed over becomes that sentence."""
    try:
        yield
    except (Captured, PolybitError):
        raise
    except Exception as error:
        raise not_in_a_row(model, f"{type(error).__name__}: {error!s:.120}") from error
