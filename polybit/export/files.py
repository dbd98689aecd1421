"""What the formats share: codes as one stream of bits, safetensors written in parts, a config.json to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polybit.core.runtime import write_json
from polybit.export.weights import Material
from polybit.hub.pieces import Place, raw, read_places, write_pieces

PART_BYTES = 4 << 30
ROWS = 1024  # rows packed at a time


def pack_bits(codes_OI: Tensor, bits: int) -> Tensor:
    """Codes of a row as one stream of bits, lowest first, in int32 words: [O, ceil(I * bits / 32)]."""
    parts = []
    for rows in codes_OI.split(ROWS):
        split = np.unpackbits(rows.numpy()[..., None], axis=-1, count=bits, bitorder="little")
        stream = split.reshape(len(rows), -1)
        stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
        parts.append(np.packbits(stream, axis=-1, bitorder="little").view(np.int32))
    return torch.from_numpy(np.concatenate(parts))


def unpack_bits(words: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of pack_bits: uint8 codes [O, columns]."""
    parts = []
    for rows in words.contiguous().split(ROWS):
        stream = np.unpackbits(rows.numpy().view(np.uint8), axis=-1, bitorder="little")[:, : columns * bits]
        split = stream.reshape(len(rows), columns, bits)
        parts.append(np.packbits(split, axis=-1, bitorder="little")[..., 0])
    return torch.from_numpy(np.concatenate(parts))


class WeightFiles:
    """`model.safetensors`, or `model-00001-of-0000N.safetensors` and their index, written as tensors come.

    What waits for its part to be full lies on the disk.
    """

    def __init__(self, stage: Path, part_bytes: int | None = None, metadata: dict[str, str] | None = None) -> None:
        self.stage, self.part_bytes = stage, PART_BYTES if part_bytes is None else part_bytes
        self.metadata = metadata or {"format": "pt"}
        self.waiting: dict[str, Place] = {}
        self.filled = self.total = 0
        self.parts: list[list[str]] = []

    @property
    def body(self) -> Path:
        """Where the values of the next part wait."""
        return self.stage / f"body-{len(self.parts)}"

    def add(self, name: str, tensor: Tensor) -> None:
        """One more tensor."""
        size = tensor.numel() * tensor.element_size()
        if self.waiting and self.filled + size > self.part_bytes:
            self.flush()
        with self.body.open("ab") as handle:
            handle.write(raw(tensor))
        self.waiting[name] = Place(self.body, tensor.dtype, tuple(tensor.shape), self.filled)
        self.filled += size
        self.total += size

    def flush(self) -> None:
        """Write what waits."""
        shapes = {n: torch.empty(place.shape, dtype=place.dtype, device="meta") for n, place in self.waiting.items()}
        part = self.stage / f"part-{len(self.parts)}"
        write_pieces(part, shapes, lambda name: self.waiting[name].pieces(), self.metadata)
        self.body.unlink(missing_ok=True)
        self.parts.append(list(self.waiting))
        self.waiting, self.filled = {}, 0

    def close(self) -> None:
        """Write the rest and give the parts their names."""
        self.flush()
        if len(self.parts) == 1:
            (self.stage / "part-0").rename(self.stage / "model.safetensors")
            return
        table: dict[str, str] = {}
        for number, names in enumerate(self.parts):
            file = f"model-{number + 1:05d}-of-{len(self.parts):05d}.safetensors"
            (self.stage / f"part-{number}").rename(self.stage / file)
            table |= dict.fromkeys(names, file)
        write_json(
            self.stage / "model.safetensors.index.json", {"metadata": {"total_size": self.total}, "weight_map": table}
        )


class TensorFiles:
    """The tensors of a directory of safetensors by name, each read when it is asked for."""

    def __init__(self, stage: Path) -> None:
        self.places = read_places(sorted(stage.glob("model*.safetensors"))) or {}

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> Tensor:
        return self.places[name][...]

    def decoded(self, name: str, kind: str) -> Tensor:
        """A layer without codes, of a kind of layer, in float32 [O, I]."""
        place = self.places[f"{name}.weight"]
        weight, at = torch.empty(place.shape), 0
        for piece in place.pieces():
            weight.view(-1)[at : at + piece.numel()] = piece
            at += piece.numel()
        return weight.T if kind == "conv1d" else weight


def plain_config(material: Material) -> dict[str, Any]:
    """config.json of the model without our own description, with the float type that is written."""
    config: Any = material.model.config
    found = dict(config.to_dict())
    for key in ("quantization_config", "torch_dtype", "_name_or_path"):
        found.pop(key, None)
    found["dtype"] = found["torch_dtype"] = str(material.dtype).removeprefix("torch.")
    found["architectures"] = [type(material.model).__name__]
    rope = found.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        found.setdefault("rope_theta", rope["rope_theta"])  # what engines older than transformers 5 look for
    return found


def write_config(material: Material, stage: Path, **more: Any) -> None:
    """config.json with what an engine needs more, and generation_config.json."""
    write_json(stage / "config.json", {**plain_config(material), **more})
    generation: Any = getattr(material.model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(stage)
