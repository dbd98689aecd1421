"""Decoded weights in a plain Hugging Face directory, adapters folded in, tied weights kept tied."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from polybit.export.weights import Material
from polybit.hub.dense import plain_model, save_plain
from polybit.hub.load import open_model
from polybit.nn.convert import targets


def write(material: Material, stage: Path) -> None:
    """Fill a directory that plain transformers loads."""
    weights = ((name, material.decoded(name)) for name in material.layers)
    save_plain(plain_model(material.model, material.floats(), weights, material.dtype), stage)
    material.held.update(dict.fromkeys(material.layers, str(material.dtype).removeprefix("torch.")))


def decode(stage: Path, material: Material) -> Iterator[tuple[str, Tensor]]:
    """Every layer as transformers loads it."""
    model = open_model(str(stage), dtype=material.dtype, trust_remote_code=False)
    known = {target.name: target for target in targets(model, include_embeddings=True)}
    for name in material.layers:
        yield name, known[name].weight_OI(model)
