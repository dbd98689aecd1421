"""compressed-tensors' pack-quantized layout: code − zero times scale, whole zero points, codes as one stream of bits.

Codes and zero points are stored as they are (the format counts from −2^(b−1) and adds it back before packing); zero
points are packed along rows. Layers of one width and group size make a group of the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polybit.core.affine import expand_groups
from polybit.export.files import TensorFiles, pack_bits, unpack_bits, write_config
from polybit.export.layers import Held, float_linears, write_layers
from polybit.export.weights import Material, ReadWeight
from polybit.hub.files import read_json

NAME, METHOD = "compressed-tensors", "compressed-tensors"


def write(material: Material, stage: Path) -> None:
    """Fill a directory that vLLM, SGLang and transformers with compressed-tensors load."""
    symmetric = all(
        layer.fields.zero == 1 << (layer.bits - 1) and layer.width == layer.bits for layer in material.layers.values()
    )

    def tensors_of(weight: ReadWeight) -> Mapping[str, Tensor]:
        found = {
            "weight_packed": pack_bits(weight.codes_OI, weight.held),
            "weight_scale": weight.step_OG.to(material.dtype),
            "weight_shape": torch.tensor(weight.codes_OI.shape),
        }
        if not symmetric:
            zero_OG = weight.zero_OG.to(torch.uint8)
            found["weight_zero_point"] = pack_bits(zero_OG.T.contiguous(), weight.held).T.contiguous()
        return found

    held = write_layers(material, stage, NAME, tensors_of)
    write_config(material, stage, quantization_config=described(held, float_linears(material, held), symmetric))


def described(held: Mapping[str, Held], ignored: list[str], symmetric: bool) -> dict[str, Any]:
    """The `quantization_config`: one group of layers for each width and group size."""
    groups = {}
    for number, scheme in enumerate(sorted(set(held.values()), key=lambda s: (s.bits, s.group_size or 0))):
        grouped = {} if scheme.group_size is None else {"group_size": scheme.group_size}
        strategy = "channel" if scheme.group_size is None else "group"
        groups[f"group_{number}"] = {
            "targets": [name for name, own in held.items() if own == scheme],
            "weights": {
                "num_bits": scheme.bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": strategy,
                "dynamic": False,
                **grouped,
            },
        }
    if len(groups) == 1:
        groups["group_0"]["targets"] = ["Linear"]
    return {
        "quant_method": METHOD,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ignored,
        "config_groups": groups,
    }


def decode(stage: Path, material: Material) -> Iterator[tuple[str, Tensor]]:
    """Every layer as compressed-tensors decompresses it, in float32."""
    files, config = TensorFiles(stage), read_json(stage / "config.json")["quantization_config"]
    schemes = list(config["config_groups"].values())
    for name, layer in material.layers.items():
        if f"{name}.weight_packed" not in files:
            yield name, files.decoded(name, layer.kind)
            continue
        own = next(s["weights"] for s in schemes if name in s["targets"] or s["targets"] == ["Linear"])
        bits, columns = own["num_bits"], layer.columns
        scale_OG = files[f"{name}.weight_scale"].float()
        size = own.get("group_size") or columns
        zero_OI = torch.tensor(float(1 << (bits - 1)))
        if not own["symmetric"]:
            packed = files[f"{name}.weight_zero_point"].T.contiguous()
            zero_OI = expand_groups(unpack_bits(packed, bits, layer.rows).T.float(), columns, size)
        codes_OI = unpack_bits(files[f"{name}.weight_packed"], bits, columns).float()
        yield name, (codes_OI - zero_OI) * expand_groups(scale_OG, columns, size)
