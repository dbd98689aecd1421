"""A model without its weights: shapes and names of every layer, from the configuration alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from polybit.core.runtime import PolybitError
from polybit.hub.load import check_architecture, first_line, load_config


def load_skeleton(name_or_path: str, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The causal LM of a local path or hub id on the meta device: no weight is read, no memory is used.

    dtype: of the weights that are not there (default: as the configuration says)
    Raises PolybitError when there is no configuration or it does not describe a causal language model.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(name_or_path, trust_remote_code=trust_remote_code)
    check_architecture(name_or_path, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the plan is about the float model behind a checkpoint
    build: Any = AutoModelForCausalLM.from_config
    more = {} if dtype is None else {"dtype": dtype}
    try:
        with torch.device("meta"):
            model = build(config, trust_remote_code=trust_remote_code, **more)
        model.tie_weights()
    except Exception as error:
        raise PolybitError(
            f"no model can be built from the configuration of {name_or_path} ({first_line(error)}): it may be damaged, "
            "or ask for what the installed transformers does not have"
        ) from error
    return model.eval()
