"""The harm of a quantized model at any choice of precisions, a whole model at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, log_softmax

from polybit.core.plan import Plan
from polybit.core.precision import Precision
from polybit.nn.switch import at, keep_decoded


class ChoiceMeter:
    """KL to the float model at any choice of precisions, nats per token over the windows."""

    def __init__(self, model: Any, float_model: Any, windows_NT: Tensor) -> None:
        self.model, self.batches = model, list(windows_NT.split(8))
        with torch.no_grad():
            self.wanted = [log_softmax(float_model(input_ids=ids_BT).logits.float(), -1) for ids_BT in self.batches]

    def __call__(self, choice: Mapping[str, str]) -> float:
        """Mean KL where each named layer has its precision, as in "w4a8"."""
        plan = Plan(Precision(), {name: Precision.parse(key) for name, key in choice.items()})
        total, count = 0.0, 0
        with torch.no_grad(), at(self.model, plan), keep_decoded(self.model):
            for ids_BT, wanted_BTV in zip(self.batches, self.wanted, strict=True):
                given_BTV = log_softmax(self.model(input_ids=ids_BT).logits.float(), -1)
                total += float((wanted_BTV.exp() * (wanted_BTV - given_BTV)).sum())
                count += ids_BT.numel()
        return total / count
