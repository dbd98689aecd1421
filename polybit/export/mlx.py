"""MLX's affine format: code · scale + bias, codes as one stream of bits per row in 32-bit words.

Read by mlx.nn.QuantizedLinear and QuantizedEmbedding; `quantization` in config.json names bits and group size, for each
layer of its own where they differ. Scale and bias are float16; bfloat16 is too coarse for 6 and 8 bits, and float32
rounds nothing but makes everything that is computed with it float32. `exact`: float32 for single layers, where needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polybit.core.affine import expand_groups
from polybit.core.runtime import PolybitError
from polybit.export.check import moves
from polybit.export.files import TensorFiles, WeightFiles, pack_bits, unpack_bits, write_config
from polybit.export.table import EXPORTERS
from polybit.export.weights import Material
from polybit.hub.files import read_json

NAME = "mlx"


def write(material: Material, stage: Path) -> None:
    """Fill a directory that mlx-lm loads."""
    files = WeightFiles(stage, metadata={"format": "mlx"})
    for name, tensor in material.floats():
        files.add(name, tensor)
    layers: dict[str, Any] = {}
    for name in material.layers:
        weight = material.fit(name, EXPORTERS[NAME], NAME)
        if weight is None:
            raise PolybitError(
                f"layer {name!r:.120} is of kind {material.layers[name].kind}, which mlx-lm has under other names: "
                "use --to dense and mlx_lm.convert"
            )
        files.add(f"{name}.weight", pack_bits(weight.codes_OI, weight.held).view(torch.uint32))
        scale_OG, bias_OG = weight.rounded(material.dtype)
        if material.exact and moves(material, name, affine(weight.codes_OI, scale_OG, bias_OG, weight.group_size)):
            scale_OG, bias_OG = weight.rounded(torch.float32)
        files.add(f"{name}.scales", scale_OG)
        files.add(f"{name}.biases", bias_OG)
        layers[name] = {"group_size": weight.group_size, "bits": weight.held}
        wide = scale_OG.dtype != material.dtype
        material.held[name] = f"{weight.held} bits, groups of {weight.group_size}{', fp32 scales' if wide else ''}"
    files.close()
    quantization = {**commonest(layers), **layers}
    write_config(material, stage, quantization=quantization, quantization_config=quantization)


def commonest(layers: dict[str, Any]) -> dict[str, int]:
    """Bits and group size of most layers, which readers take for those without an entry."""
    kinds = Counter((entry["group_size"], entry["bits"]) for entry in layers.values())
    group_size, bits = kinds.most_common(1)[0][0]
    return {"group_size": group_size, "bits": bits}


def decode(stage: Path, material: Material) -> Iterator[tuple[str, Tensor]]:
    """Every layer as MLX's `dequantize` defines it, in float32."""
    quantization, files = read_json(stage / "config.json")["quantization"], TensorFiles(stage)
    for name, layer in material.layers.items():
        entry = quantization[name]
        codes_OI = unpack_bits(files[f"{name}.weight"].view(torch.int32), entry["bits"], layer.columns)
        yield name, affine(codes_OI, files[f"{name}.scales"], files[f"{name}.biases"], entry["group_size"])


def affine(codes_OI: Tensor, scale_OG: Tensor, bias_OG: Tensor, group_size: int) -> Tensor:
    """scale · code + bias in float32."""
    spread = lambda x_OG: expand_groups(x_OG.float(), codes_OI.shape[1], group_size)  # noqa: E731
    return codes_OI.float() * spread(scale_OG) + spread(bias_OG)
