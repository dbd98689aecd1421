"""A plain float model out of a quantized one and decoded weights: to save for other engines, and to compare with."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polybit.core.runtime import PolybitError
from polybit.hub.quiet import quiet
from polybit.nn.convert import Target, targets


def plain_model(
    model: nn.Module,
    floats: Iterable[tuple[str, Tensor]],
    weights: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
) -> nn.Module:
    """The float model of a quantized one's class and configuration.

    floats: the tensors that are no part of a quantized weight · weights: layer -> weight [O, I] · dtype: what all
    floating tensors are made.
    """
    config: Any = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    build: Any = type(model)
    with torch.device("meta"):
        plain = build(config)
    known = {target.name: target for target in targets(plain, include_embeddings=True)}
    state = {name: as_dtype(tensor, dtype) for name, tensor in floats}
    for name, weight_OI in weights:
        state[parameter_name(known[name])] = own_layout(known[name], weight_OI, plain).to(dtype)
    plain.load_state_dict(state, strict=False, assign=True)
    plain.tie_weights()
    buffers = dict(model.named_buffers())
    for name, buffer in list(plain.named_buffers()):
        if buffer.is_meta:  # computed from the configuration, and in no file
            owner, _, leaf = name.rpartition(".")
            plain.get_submodule(owner)._buffers[leaf] = buffers[name]
    missing = [name for name, parameter in plain.named_parameters() if parameter.is_meta]
    if missing:
        raise PolybitError(f"the weight {missing[0]!r:.120} of the float model is not in the checkpoint: make it again")
    if getattr(model, "generation_config", None) is not None:
        plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.eval().requires_grad_(False)


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Floating tensors in one type, others as they are."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def parameter_name(target: Target) -> str:
    """The name of a target's parameter in the state of the model."""
    return target.name if target.kind == "experts" else f"{target.name}.weight"


def own_layout(target: Target, weight_OI: Tensor, plain: nn.Module) -> Tensor:
    """A weight [O, I] as the module stores it."""
    shape = target.parameter(plain).shape
    return weight_OI.T.contiguous() if target.kind == "conv1d" else weight_OI.reshape(shape)


def save_plain(plain: nn.Module, stage: Path) -> None:
    """Write a plain model as transformers writes it, with the names that its own files have."""
    save: Any = plain.save_pretrained
    with quiet():
        save(stage, max_shard_size="4GB")
