"""KD and, beside it, the relative squared distance of the hidden states after every block, over all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from polybit.train.cascade import decoder_blocks, hidden_states
from polybit.train.distill import Distillation


class Features:
    """weight: of the distance beside `distill`."""

    separable = True
    needs = frozenset({"chosen"})

    def __init__(self, weight: float, distill: Distillation) -> None:
        self.weight, self.distill = weight, distill
        self.model: nn.Module | None = None

    def listen(self, model: nn.Module) -> None:
        """The model whose blocks are watched."""
        decoder_blocks(model)
        self.model = model

    def __call__(self, forward: Any, batch: Any, presets: tuple[str, ...]) -> tuple[Tensor, dict[str, float]]:
        """Sum over presets."""
        assert self.model is not None
        part = batch["chosen"]
        mask = part["mask_BT"][..., None]
        with torch.no_grad(), hidden_states(self.model) as teacher:
            forward(part, "float")
        total, logs = torch.zeros(()), {}
        for preset in presets:
            with hidden_states(self.model) as student:
                logits_NV = forward(part, preset)
            pairs = zip(student, teacher, strict=True)
            far = torch.stack([((s - t).pow(2) * mask).sum() / (t.pow(2) * mask).sum() for s, t in pairs]).mean()
            loss = self.distill.loss(logits_NV.float(), part)
            logs |= {f"{preset}/kd": float(loss.detach()), f"{preset}/far": float(far.detach())}
            total = total + loss + self.weight * far
        return total, logs
