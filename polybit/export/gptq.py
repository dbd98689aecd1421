"""The GPTQ layout: codes packed along columns, zero points along rows, both in 32-bit words, groups in order.

`checkpoint_format` is `gptq`, the older of the two, which stores each zero point less one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from polybit.core.affine import expand_groups
from polybit.core.runtime import PolybitError
from polybit.export.files import TensorFiles, pack_bits, unpack_bits, write_config
from polybit.export.layers import write_layers
from polybit.export.weights import Material, ReadWeight
from polybit.hub.files import read_json

NAME = "gptq"


def write(material: Material, stage: Path) -> None:
    """Fill a directory that GPTQModel, vLLM, SGLang and transformers with optimum load."""

    def tensors_of(weight: ReadWeight) -> Mapping[str, Tensor]:
        zero_OG = weight.zero_OG.to(torch.int16)
        stored_OG = ((zero_OG - 1) & ((1 << weight.held) - 1)).to(torch.uint8)  # the layout stores zero − 1
        columns = weight.codes_OI.shape[1]
        return {
            "qweight": pack_bits(weight.codes_OI, weight.held).T.contiguous(),
            "qzeros": pack_bits(stored_OG.T.contiguous(), weight.held),
            "scales": weight.step_OG.to(torch.float16).T.contiguous(),
            "g_idx": (torch.arange(columns) // weight.group_size).to(torch.int32),
        }

    held = write_layers(material, stage, NAME, tensors_of)
    schemes = set(held.values())
    if len(schemes) > 1:
        said = ", ".join(sorted(f"{s.bits} bits in groups of {s.group_size or 'a row'}" for s in schemes))
        raise PolybitError(f"--to {NAME} holds one width and one group size, this has {said}: use another format")
    scheme = schemes.pop()
    symmetric = all(layer.fields.zero == 1 << (layer.bits - 1) for layer in material.layers.values())
    described = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size or -1,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": False,
    }
    write_config(material, stage, quantization_config=described)


def decode(stage: Path, material: Material) -> Iterator[tuple[str, Tensor]]:
    """Every layer as (code − zero) · scale, in float32."""
    files, config = TensorFiles(stage), read_json(stage / "config.json")["quantization_config"]
    bits = config["bits"]
    for name, layer in material.layers.items():
        if f"{name}.qweight" not in files:
            yield name, files.decoded(name, layer.kind)
            continue
        size = config["group_size"] if config["group_size"] > 0 else layer.columns
        codes_OI = unpack_bits(files[f"{name}.qweight"].T.contiguous(), bits, layer.columns).float()
        less_one_OG = unpack_bits(files[f"{name}.qzeros"], bits, layer.rows).T
        zero_OG = ((less_one_OG.int() + 1) & ((1 << bits) - 1)).float()
        spread = lambda x: expand_groups(x, layer.columns, size)  # noqa: E731, B023
        yield name, (codes_OI - spread(zero_OG)) * spread(files[f"{name}.scales"].float().T)
