"""One forward pass of a part of a batch: only the logits that are needed are made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from polybit.hub.likelihood import keep_positions

NAMES = {"mask_BT": "attention_mask", "positions_BT": "position_ids"}


def logits_of(model: nn.Module, part: Mapping[str, Tensor], *, head_of: nn.Module | None = None) -> Tensor:
    """logits_BTV of a part with ids_BT and, where given, mask_BT, positions_BT, mask_B1TT (True = sees); with keep_BT
    the logits at those positions alone, [N, V].

    head_of: the model whose output head is watched, when `model` is a wrapper around it.
    """
    given: dict[str, Any] = {"input_ids": part["ids_BT"], "use_cache": False}
    given |= {theirs: part[ours] for ours, theirs in NAMES.items() if ours in part}
    if "mask_B1TT" in part:  # added to the scores, which every attention understands; some take no mask of truths
        dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        seen = part["mask_B1TT"]
        given["attention_mask"] = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    if "keep_BT" not in part:
        return model(**given).logits
    with keep_positions(head_of or model, part["keep_BT"]):
        return model(**given).logits[0]
