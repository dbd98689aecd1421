"""A model without its weights: shapes and names of every layer, from the configuration alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from polybit.core.runtime import PolybitError


def load_skeleton(name_or_path: str, *, trust_remote_code: bool = False) -> nn.Module:
    """The causal LM of a local path or hub id on the meta device: no weight is read, no memory is used.

    Raises PolybitError when there is no configuration or it does not describe a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(name_or_path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise PolybitError(f"{name_or_path} has no config.json: give a model directory, a hub id, or 'tinychat'")
    if path.is_file():
        raise PolybitError(f"{name_or_path} is a file: give the directory that holds config.json, or a hub id")
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PolybitError(
            f"the configuration of {name_or_path!r} could not be read ({reason}): "
            "give a local directory, a hub id that can be reached, or 'tinychat'"
        ) from error
    for key in ("quantization_config",):
        if hasattr(config, key):
            delattr(config, key)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise PolybitError(
            f"{name_or_path!r} is a {config.model_type!r} model, not a causal language model: choose one that generates text"
        ) from error
    model.tie_weights()
    return model.eval()
