"""A model whose feed-forwards have their hidden units sorted by salience: the same function, and blocks that differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polybit.compress.stats import collect
from polybit.core.runtime import PolybitError
from polybit.hub.directory import staged_directory
from polybit.hub.quiet import quiet
from polybit.nn.convert import Target
from polybit.nn.sorting import feed_forwards, sort_units
from polybit.quant.salience import column_salience


def sort_model(model: Any, chosen: Sequence[Target], batches: Sequence[Tensor]) -> None:
    """Sort hidden units in place by salience, most salient first, and make sure that the function stayed."""
    found = feed_forwards(chosen)
    if not found:
        raise PolybitError("--sort finds no feed-forward it can sort in this model: leave --sort out")
    with torch.no_grad():
        before_BTV = model(batches[0]).logits
        stats = collect(model, batches, [layers.out for layers in found])
        for layers in found:
            salience_I = column_salience(layers.out.weight_OI(model), stats[layers.out.name])
            sort_units(model, layers, salience_I.argsort(descending=True, stable=True))
        after_BTV = model(batches[0]).logits
    gap = float((after_BTV - before_BTV).abs().max() / before_BTV.abs().max())
    if not gap < 1e-3:
        raise PolybitError(
            f"--sort changed the model's logits by {gap:.1e} of their size, so its feed-forwards are of another kind "
            "than their names say: leave --sort out"
        )


@contextmanager
def saved_after(model: Any, tokenizer: Any, out: Path) -> Iterator[None]:
    """Save a model that appears at `out` when the context is left, so that a run that stops in it can be repeated."""
    with staged_directory(out, overwrite=False) as stage:
        with quiet():
            model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)
        yield
