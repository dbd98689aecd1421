"""A polybit checkpoint whose weights stay in their files and are lent a block at a time, as `lent` does it for a float
model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from polybit.core.records import Rotation
from polybit.core.runtime import PolybitError
from polybit.hub.checkpoint import Description, weight_files
from polybit.hub.files import read_headers, read_json
from polybit.hub.lent import LentModel, add_generation, compute_buffers
from polybit.hub.load import fetch
from polybit.hub.peft import read_adapters
from polybit.hub.pieces import Place, read_places
from polybit.hub.plugin import check_names, validate_once
from polybit.hub.skeleton import load_skeleton
from polybit.kernels.prepared import Holder
from polybit.nn.board import board_of
from polybit.nn.convert import Target, install, targets
from polybit.nn.linear import QuantWeight
from polybit.nn.switch import multiply_by, set_presets


class LentCheckpoint(LentModel):
    """A skeleton with quantized modules, and the files their planes come from.

    targets: of the float model it was made from
    """

    def __init__(self, name: str, model: nn.Module, places: Mapping[str, Place], targets: list[Target]) -> None:
        super().__init__(name, model, places, None)
        self.targets = targets

    def _forget(self, name: str) -> None:
        module = self.model.get_submodule(name.rpartition(".")[0])
        super()._forget(name)
        if isinstance(module, QuantWeight):
            module.holder, module.kept = Holder(), None  # what kernels were handed


def open_lent_checkpoint(name: str, *, trust_remote_code: bool = False) -> LentCheckpoint:
    """The checkpoint of a local path or hub id without its weights, at all stored bits.

    Raises PolybitError for a checkpoint that is damaged.
    """
    path = Path(name) if Path(name).is_dir() else fetch(name)
    validate_once(path)
    declared = read_json(path / "config.json")["quantization_config"]
    description = Description.from_json(declared)
    model = load_skeleton(str(path), dtype=torch.float32, trust_remote_code=trust_remote_code)
    compute_buffers(model)
    known = {target.name: target for target in targets(model, include_embeddings=True)}
    for layer in description.layers:
        if layer not in known:
            raise PolybitError(
                f"{name} quantizes {layer!r:.120}, which {type(model).__name__} does not have: make it again"
            )
    with torch.device("meta"):
        install(model, {layer: (known[layer], fields, None) for layer, fields in description.layers.items()})
    model.config.quantization_config = declared  # type: ignore[union-attr]
    set_presets(model, description.presets)
    read_adapters(model, path)
    if "rotation" in description.notes:
        board_of(model).rotation = Rotation.from_json(description.notes["rotation"])
    multiply_by(model)
    add_generation(model, str(path))
    files = weight_files(path, description)
    check_names(model, read_headers(files))
    places = read_places(files) or {}
    return LentCheckpoint(name, model.eval(), places, list(known.values()))
