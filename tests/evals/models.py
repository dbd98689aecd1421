"""Models whose logits follow from a rule: one that knows nothing, one that knows every next token."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn


class Uniform(nn.Module):
    """Every token is as likely as any other."""

    def __init__(self, vocabulary: int = 96):
        super().__init__()
        self.zero_V = nn.Parameter(torch.zeros(vocabulary))
        text = SimpleNamespace(vocab_size=vocabulary)
        self.config = SimpleNamespace(get_text_config=lambda: text, eos_token_id=2)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.zero_V.expand(*input_ids.shape, -1))


class KnowsNext(Uniform):
    """Sure that token n + 1 follows token n."""

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=20.0 * nn.functional.one_hot(input_ids + 1, len(self.zero_V)))
