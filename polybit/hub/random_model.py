"""A Llama of any size with random weights, quantized or in bf16: as fast as a trained one, and there at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from polybit.core.memory import collapse
from polybit.core.planes import COLUMNS, ROWS, Planes
from polybit.core.runtime import PolybitError
from polybit.nn.convert import install, targets
from polybit.nn.fields import Fields, tensors_of


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama; the default has half a billion weights."""

    hidden: int = 1280
    layers: int = 24
    intermediate: int = 3584
    vocabulary: int = 32000
    heads: int = 20
    kv_heads: int = 4
    context: int = 2048

    def configuration(self) -> Any:
        """The transformers configuration."""
        from transformers import LlamaConfig

        if self.hidden % self.heads or self.heads % self.kv_heads or self.hidden // self.heads % 2:
            raise PolybitError(
                f"hidden size {self.hidden} with {self.heads} heads and {self.kv_heads} key heads is no Llama: "
                "heads must divide the hidden size into even parts, and key heads the heads"
            )
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.context,
            tie_word_embeddings=False,
        )


def random_quantized(shape: Shape, *, group_size: int = 64, bits: int = 8) -> nn.Module:
    """A float32 Llama whose every matrix is `bits` random planes; nothing is quantized, so it takes seconds."""
    model = skeleton(shape)
    stored = {}
    for seed, target in enumerate(targets(model, include_embeddings=True)):
        if target.columns % max(group_size, COLUMNS):
            raise PolybitError(f"{target.columns} columns are no multiple of the group size {group_size}: change one")
        planes = random_planes(target.rows, target.columns, seed, group_size=group_size, bits=bits)
        stored[target.name] = (target, Fields.of(planes), tensors_of(planes))
    install(model, stored)
    return fill(model, torch.float32)


def random_float(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The same Llama with random float weights."""
    return fill(skeleton(shape), dtype)


def random_planes(rows: int, columns: int, seed: int, *, group_size: int = 64, bits: int = 8) -> Planes:
    """A stored weight of random bits whose outputs are about as large as its inputs."""
    draw = torch.Generator().manual_seed(seed)
    blocks = -(-rows // ROWS)
    planes = torch.empty(bits, blocks, -(-columns // COLUMNS), ROWS * COLUMNS // 8, dtype=torch.uint8)
    collapse(planes)  # before it is filled, so that its pages are large from the first touch
    planes.random_(generator=draw)
    collapse(planes)
    groups = -(-columns // group_size) if group_size else 1
    scale = torch.rand(blocks, groups, ROWS, generator=draw).add_(0.5).half()
    gain = 2.0 ** round(math.log2(12**0.5 / 2**bits / columns**0.5))
    return Planes(planes, scale, ((1 << bits) - 1) / 2, gain, (rows, columns), group_size)


def skeleton(shape: Shape) -> Any:
    """The model without weights."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(shape.configuration()).eval()


def fill(model: Any, dtype: torch.dtype) -> nn.Module:
    """Random values for every float matrix that is still missing, ones for the norms, the rotation computed anew."""
    for name, parameter in list(model.named_parameters()):
        if not parameter.is_meta:
            continue
        value = torch.ones(parameter.shape, dtype=dtype)
        if value.ndim > 1:
            collapse(value)
            value.uniform_(-1, 1).mul_((3 / value.shape[1]) ** 0.5)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    for module in model.modules():
        if hasattr(module, "like"):
            module.like = torch.empty(0, dtype=dtype)
    model.generation_config.pad_token_id = 0
    return model
