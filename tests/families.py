"""Tiny random models of every supported family and a trivial quantizer, for the tests of several rooms."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from polybit.core.affine import QWeight, encode, split_groups, storable_scale
from polybit.core.planes import Planes, pack, storable_ratio
from polybit.nn.convert import convert, targets

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 72,
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
GPT2 = {"vocab_size": 96, "n_embd": 72, "n_layer": 2, "n_head": 4, "n_positions": 64}
NEO = {"vocab_size": 96, "hidden_size": 72, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
OPT = {"vocab_size": 96, "hidden_size": 72, "ffn_dim": 136, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": ("llama", GROUPED),
    "llama-tied": ("llama", GROUPED | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", GROUPED),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 18, "tie_word_embeddings": True}),
    "mistral": ("mistral", GROUPED | {"head_dim": 18}),
    "gemma": ("gemma", GROUPED | {"head_dim": 18}),
    "phi": ("phi", GROUPED | {"hidden_size": 80}),
    "gpt2": ("gpt2", GPT2 | {"bos_token_id": 1, "eos_token_id": 2}),
    "gpt_neo": (
        "gpt_neo",
        NEO | {"attention_types": [[["global", "local"], 1]], "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": ("gpt_neox", SIZES),
    "falcon": ("falcon", SIZES | {"multi_query": True, "new_decoder_architecture": False}),
    "falcon-new": ("falcon", SIZES | {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "opt": ("opt", OPT | {"word_embed_proj_dim": 40, "max_position_embeddings": 64}),
    "mixtral": ("mixtral", GROUPED | {"num_local_experts": 4}),
    "qwen2_moe": ("qwen2_moe", GROUPED | EXPERTS | {"shared_expert_intermediate_size": 56}),
    "qwen3_moe": ("qwen3_moe", GROUPED | EXPERTS | {"head_dim": 18, "decoder_sparse_step": 1}),
}


def tiny_model(family: str, seed: int = 0) -> nn.Module:
    """A random model of a family, in evaluation mode, float32, with weights large enough that its logits differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes = FAMILIES[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model.eval()


def rtn(
    weight_OI: Tensor, bits: int = 8, group_size: int = 32, zero: str = "group", bits_G: tuple[int, ...] | None = None
) -> QWeight:
    """Round to nearest, per group, the plainest way there is; `bits_G` gives every group a width of its own."""
    grouped, mask = split_groups(weight_OI, group_size)
    own_G = None if bits_G is None else torch.tensor(bits_G, dtype=torch.uint8)
    top = torch.tensor((1 << bits) - 1.0) if own_G is None else (1 << own_G.long()) - 1.0
    low = torch.where(mask, grouped, torch.inf).amin(-1).clamp_max(0)
    high = torch.where(mask, grouped, -torch.inf).amax(-1).clamp_min(0)
    if zero == "group":
        scale = storable_scale((high - low).clamp_min(1e-8) / top)
        point = (-low / scale).round().clamp_min(0).minimum(top)
    else:
        scale = storable_scale(torch.maximum(-low, high).clamp_min(1e-8) * 2 / top)
        point = torch.tensor(((1 << bits) - 1) / 2)
    ratios = {bits - 1: torch.tensor(1.03125), bits - 2: storable_ratio(1 + 0.1 * torch.rand(scale.shape))}
    column_scale = (1 + torch.arange(weight_OI.shape[1]) % 3 / 8).half().float()
    codes = encode(weight_OI / column_scale, scale, point, bits, group_size, own_G)
    return QWeight(codes, scale, point, bits, group_size, ratios, column_scale, own_G)


def some_widths(columns: int, group_size: int, bits: int = 8) -> tuple[int, ...]:
    """A different width for neighbouring groups, the largest `bits`."""
    return tuple((bits, bits - 1, max(1, bits - 4), bits - 1)[g % 4] for g in range(-(-columns // group_size)))


def quantize(
    model: nn.Module, *, include_embeddings: bool = False, bits: int = 8, ragged: bool = False
) -> dict[str, Planes]:
    """Planes of every target; the options vary from layer to layer, so that each combination is met.

    ragged: a width per group wherever groups are large enough.
    """
    found = {}
    for n, target in enumerate(targets(model, include_embeddings=include_embeddings)):
        group_size, zero = (0, 16, 32, 64)[n % 4], ("group", "fixed")[n % 3 % 2]
        own = some_widths(target.columns, group_size, bits) if ragged and group_size >= 32 else None
        found[target.name] = pack(rtn(target.weight_OI(model), bits, group_size, zero, own))
    return found


def quantized(family: str, *, include_embeddings: bool = False, bits: int = 8, ragged: bool = False) -> nn.Module:
    """A tiny model of a family, quantized in place."""
    model = tiny_model(family)
    return convert(model, quantize(model, include_embeddings=include_embeddings, bits=bits, ragged=ragged))


def prompt() -> Tensor:
    """Token ids [2, 9]."""
    return torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(5))
