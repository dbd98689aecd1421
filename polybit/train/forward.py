"""One forward pass of a part of a batch: only the logits that are needed are made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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


@contextmanager
def keep_positions(model: nn.Module, keep_BT: Tensor) -> Iterator[None]:
    """While it lasts, the output head sees only the hidden states at `keep_BT`, as one row [1, N, D].

    The logits of prompts and padding, most of the memory of a step with a large vocabulary, are then never made.
    Whatever the model does to logits afterwards (a cap, a factor) it does to these.
    """
    ask: Any = model.get_output_embeddings
    kept_BT = keep_BT.bool()
    handle = ask().register_forward_pre_hook(lambda _, inputs: (inputs[0][kept_BT][None], *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()
