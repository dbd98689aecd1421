"""What engines read, by their own libraries or by the published layout, written down a second time."""

from __future__ import annotations

import json
import re

import numpy as np
import torch
from safetensors.torch import load_file


def dense(directory, name, _columns):
    """The tensor as transformers' file has it."""
    return load_file(directory / "model.safetensors")[f"{name}.weight"].float()


def mlx(directory, name, _columns):
    """By MLX itself."""
    import mlx.core as mx

    tensors = mx.load(str(directory / "model.safetensors"))
    entry = json.loads((directory / "config.json").read_text())["quantization"][name]
    scales, biases = (tensors[f"{name}.{key}"].astype(mx.float32) for key in ("scales", "biases"))
    weight = mx.dequantize(tensors[f"{name}.weight"], scales, biases, entry["group_size"], entry["bits"])
    return torch.from_numpy(np.array(weight))


def gguf(directory, name, _columns):
    """By transformers' own reader of GGUF files."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file="model.gguf", dtype=torch.float32)
    return model.get_submodule(name).weight.detach()


def compressed_tensors(directory, name, _columns):
    """By the package compressed-tensors itself."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    tensors = load_file(directory / "model.safetensors")
    groups = json.loads((directory / "config.json").read_text())["quantization_config"]["config_groups"].values()
    group = next(group for group in groups if name in group["targets"] or group["targets"] == ["Linear"])
    own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    own["weight_scale"] = own["weight_scale"].float()
    return PackedQuantizationCompressor.decompress(own, QuantizationScheme(**group))["weight"].float()


def gptq(directory, name, columns):
    """By the layout: word w of a column of qweight holds rows of 32 / bits inputs, lowest bits first."""
    tensors = load_file(directory / "model.safetensors")
    bits = json.loads((directory / "config.json").read_text())["quantization_config"]["bits"]
    shifts, mask = torch.arange(0, 32, bits), (1 << bits) - 1
    words = tensors[f"{name}.qweight"]
    codes_IO = ((words[:, None, :] >> shifts[:, None]) & mask).reshape(columns, -1)
    zeros = tensors[f"{name}.qzeros"]
    zero_GO = (((zeros[..., None] >> shifts) & mask).flatten(1) + 1) & mask
    group_I = tensors[f"{name}.g_idx"].long()
    scale_GO = tensors[f"{name}.scales"].float()
    return ((codes_IO - zero_GO[group_I]) * scale_GO[group_I]).T


def humming(directory, name, columns):
    """By humming's pack_weight: element i of 32 lies at bit i * bits of as many words as a code has bits."""
    tensors = load_file(directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    for key, own in config["dynamic"].items():
        if key.startswith("+:") and re.match(key[2:], name):
            config = config | own
            break
    bits = int(config["b_dtype"][4:])
    words = tensors[f"{name}.weight"].numpy().view(np.uint32).astype(np.uint64).reshape(-1, columns // 32, bits)
    codes = []
    for i in range(32):
        word, offset = divmod(i * bits, 32)
        value = words[..., word] >> np.uint64(offset)
        if offset + bits > 32:
            value |= words[..., word + 1] << np.uint64(32 - offset)
        codes.append(value & np.uint64((1 << bits) - 1))
    codes_OI = torch.from_numpy(np.stack(codes, -1).reshape(-1, columns).astype(np.float32))
    size = config["weight_scale_group_size"] or columns
    spread = lambda key: tensors[f"{name}.{key}"].float().repeat_interleave(size, 1)  # noqa: E731
    return (codes_OI - spread("zero_point")) * spread("weight_scale")


ORACLES = {
    "dense": dense,
    "mlx": mlx,
    "gguf": gguf,
    "compressed-tensors": compressed_tensors,
    "gptq": gptq,
    "humming": humming,
}
