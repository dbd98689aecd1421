"""Writing a model for engines that read Hugging Face names: codes of its layers by one format, all else in float."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from polybit.core.runtime import PolybitError
from polybit.export.files import WeightFiles
from polybit.export.table import EXPORTERS
from polybit.export.weights import Material, ReadWeight


@dataclass(frozen=True, slots=True)
class Held:
    """How one layer is held: bits of its codes, columns of a group (None = a whole row)."""

    bits: int
    group_size: int | None


def write_layers(
    material: Material, stage: Path, label: str, tensors_of: Callable[[ReadWeight], Mapping[str, Tensor]]
) -> dict[str, Held]:
    """Write all tensors, those of a layer's codes as `tensors_of` gives them; what cannot be codes is decoded.

    Returns how each layer with codes is held. A model of which no layer can be codes is refused.
    """
    files, held = WeightFiles(stage), {}
    for name, tensor in material.floats():
        files.add(name, tensor)
    for name, layer in material.layers.items():
        weight = material.fit(name, EXPORTERS[label], label)
        if weight is None:
            files.add(f"{name}.weight", decoded_layer(material, name, label))
            material.held[name] = f"{str(material.dtype).removeprefix('torch.')}, decoded"
            continue
        for leaf, tensor in tensors_of(weight).items():
            files.add(f"{name}.{leaf}", tensor)
        whole = weight.group_size == layer.columns
        held[name] = Held(weight.held, None if whole else weight.group_size)
        material.held[name] = f"{weight.held} bits, {'one group a row' if whole else f'groups of {weight.group_size}'}"
    if not held:
        raise PolybitError(f"--to {label} holds none of this model's layers as codes: use --to dense")
    files.close()
    return held


def decoded_layer(material: Material, name: str, label: str) -> Tensor:
    """A layer that a format does not know as codes, in float and in the layout of the float model."""
    kind = material.layers[name].kind
    if kind == "experts":
        raise PolybitError(f"{name!r:.120} are fused experts, which --to {label} does not know: use --to dense")
    weight_OI = material.decoded(name, material.dtype)
    return weight_OI.T if kind == "conv1d" else weight_OI


def float_linears(material: Material, held: Mapping[str, Held]) -> list[str]:
    """Linear layers without codes, which an engine must be told of."""
    found = []
    for name, module in material.model.named_modules():
        linear = isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features"))
        if linear and name not in held:
            found.append(name)
    return found
