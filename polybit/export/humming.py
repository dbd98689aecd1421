"""The layout of humming, the kernels that vLLM and SGLang use for 1 to 8 bits: (code − zero) · scale, zero a float.

Codes lie in a row as one stream of bits in 32-bit words. `dynamic` of the configuration names, by expressions, layers
of another width than most; the engines ask with the names of their fused layers, which the expressions hold too.
"""

from __future__ import annotations

import re
from collections import Counter
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

NAME = "humming"
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def write(material: Material, stage: Path) -> None:
    """Fill a directory that vLLM and SGLang load with their method `humming`."""

    def tensors_of(weight: ReadWeight) -> Mapping[str, Tensor]:
        scale_OG, bias_OG = weight.step_OG.to(material.dtype).double(), weight.rounded(torch.float64)[1]
        # the zero point makes up for the rounding of the scale, as the bias of MLX does
        mean_OG = weight.codes_OI.double().unflatten(1, (-1, weight.group_size)).mean(-1)
        middle_OG = weight.step_OG * mean_OG + bias_OG
        zero_OG = torch.where(scale_OG == 0, weight.zero_OG, mean_OG - middle_OG / scale_OG)
        return {
            "weight": pack_bits(weight.codes_OI, weight.held),
            "weight_scale": scale_OG.to(material.dtype),
            "zero_point": zero_OG.to(material.dtype),
        }

    held = write_layers(material, stage, NAME, tensors_of)
    write_config(material, stage, quantization_config=described(held, float_linears(material, held)))


def described(held: Mapping[str, Held], ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config`: the scheme of most layers, and what differs."""
    usual = Counter(held.values()).most_common(1)[0][0]
    dynamic: dict[str, Any] = {f"-:{expression(name)}": {} for name in ignored}
    dynamic |= {f"+:{expression(name)}": scheme(own) for name, own in held.items() if own != usual}
    return {"quant_method": NAME, **scheme(usual), "dynamic": dynamic}


def scheme(own: Held) -> dict[str, Any]:
    """What humming calls a width and a group size."""
    return {
        "b_dtype": f"uint{own.bits}",
        "weight_scale_group_size": own.group_size or 0,
        "has_zero_point": True,
        "is_fp_zero_point": True,
    }


def expression(name: str) -> str:
    """An expression for a layer, under its own name and that of the fused layer it becomes a part of."""
    parent, _, leaf = name.rpartition(".")
    names = [leaf, *(fused for fused, parts in FUSED.items() if leaf in parts)]
    return f"{re.escape(f'{parent}.') if parent else ''}({'|'.join(map(re.escape, names))})$"


def decode(stage: Path, material: Material) -> Iterator[tuple[str, Tensor]]:
    """Every layer as humming's `dequant_tensors` defines it, in float32."""
    files, config = TensorFiles(stage), read_json(stage / "config.json")["quantization_config"]
    for name, layer in material.layers.items():
        if f"{name}.weight_scale" not in files:
            yield name, files.decoded(name, layer.kind)
            continue
        changes = (own for key, own in config["dynamic"].items() if key[0] == "+" and re.match(key[2:], name))
        own = {**config, **next(changes, {})}
        bits, size = int(own["b_dtype"].removeprefix("uint")), own["weight_scale_group_size"] or layer.columns
        spread = lambda x: expand_groups(x.float(), layer.columns, size)  # noqa: E731, B023
        codes_OI = unpack_bits(files[f"{name}.weight"], bits, layer.columns).float()
        yield name, (codes_OI - spread(files[f"{name}.zero_point"])) * spread(files[f"{name}.weight_scale"])
