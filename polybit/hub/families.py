"""Which models the compiled decoding steps know: Llama-like decoders that nothing else has laid hands on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polybit.core.precision import FLOAT
from polybit.hub.cache import give_cache
from polybit.nn.board import board_of
from polybit.nn.linear import QuantWeight

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
STEADY_ROTATIONS = ("default", "linear", "llama3", "yarn")  # whose angles do not depend on the length of the text


def is_known(model: nn.Module) -> bool:
    """Whether a compiled step computes what the model's own forward pass does: family, types, places, no hooks.

    The hook that packs caches does nothing while keys and values have no width of their own.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in FAMILIES:
        return False
    rotation = getattr(config, "rope_parameters", None) or {}
    if rotation.get("rope_type", "default") not in STEADY_ROTATIONS or getattr(config, "hidden_act", "") != "silu":
        return False
    inner = getattr(model, "model", None)
    if inner is None or not len(getattr(inner, "layers", ())) or not hasattr(inner, "rotary_emb"):
        return False
    narrow = any(p.k != FLOAT or p.v != FLOAT for p in (o.precision for o in (board_of(model).operands or {}).values()))
    for module in model.modules():
        idle = module is model and not narrow and set(module._forward_pre_hooks.values()) <= {give_cache}
        if module._forward_hooks or "forward" in module.__dict__ or not (idle or not module._forward_pre_hooks):
            return False
    stored = {id(p) for layer in stored_weights(model) for p in layer.parameters()}
    floats = [p for p in model.parameters() if id(p) not in stored]
    return all(p.is_cpu for p in model.parameters()) and all(p.dtype == torch.float32 for p in floats)


def stored_weights(model: nn.Module) -> list[nn.Module]:
    """Quantized layers; none of a float model."""
    return [module for module in model.modules() if isinstance(module, QuantWeight)]
