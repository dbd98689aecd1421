"""What engines read, by their own libraries or by the published layout, written down a second time."""

from __future__ import annotations

import json

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


ORACLES = {"dense": dense, "mlx": mlx, "gguf": gguf}
