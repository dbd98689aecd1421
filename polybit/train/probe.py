"""Held-out flips and KL of a model in training, and the renewal of its own answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from polybit.hub.lm import LocalLM
from polybit.nn.switch import at
from polybit.train.distill import token_divergence
from polybit.train.forward import logits_of
from polybit.train.latent import FLOAT_PRESET, latent_layers
from polybit.train.material import PairMaterial, score
from polybit.train.picker import Probed
from polybit.train.preference import token_logps

ROWS = 32  # answers per forward pass


@dataclass(frozen=True)
class AnswerProbe:
    """Teacher-forced on the float model's answers to held-out prompts, at each preset.

    flips: share of tokens whose likeliest is not the float model's · kl: KL(float || quantized), nats per token ·
    chosen: log-probability of the float answers minus the float model's own, nats per token (falls under displacement).
    """

    held_out: PairMaterial
    presets: tuple[str, ...]

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Probed:
        """Measure every preset."""
        return {preset: self.one(model, preset) for preset in self.presets}

    def one(self, model: nn.Module, preset: str) -> dict[str, float]:
        """Measure one preset."""
        sums = torch.zeros(3, dtype=torch.float64)
        total = 0
        device = next(model.parameters()).device
        with at(model, preset):
            for start in range(0, len(self.held_out), ROWS):
                rows = range(start, min(start + ROWS, len(self.held_out)))
                answers = [self.held_out.chosen[row] for row in rows]
                part = self.held_out.part(rows, answers, [0] * len(rows))
                part = {name: tensor.to(device) for name, tensor in part.items()}
                logits_NV = logits_of(model, part).float()
                flips_N = logits_NV.argmax(-1) != part["top_index_NK"][:, 0]
                kl_N = token_divergence(logits_NV, part["top_logp_NK"], part["top_index_NK"])
                gain_N = token_logps(logits_NV, part["target_N"]) - part["logp_N"]
                sums += torch.stack([flips_N.double().sum(), kl_N.double().sum(), gain_N.double().sum()]).cpu()
                total += len(flips_N)
        flips, kl, chosen = (sums / total).tolist()
        return {"flips": flips, "kl": kl, "chosen": chosen}


@dataclass
class Renewal:
    """Answers the prompts of the coming steps anew with the model as it is now, and has the float model score them.

    The float model is the trainable model's own "float" preset (latent.py), so that it costs no second copy. top: how
    many of the teacher's tokens are kept, for on-policy distillation; 0 for preferences, which need one number a token.
    """

    lm: LocalLM
    material: PairMaterial
    order: Sequence[int]
    presets: tuple[str, ...]
    every: int
    batch: int
    max_tokens: int
    top: int = 0
    seconds: float = field(default=0.0)

    def __call__(self, step: int) -> None:
        """Renew what steps `step` .. `step + every - 1` will read."""
        material, model = self.material, self.lm.model
        rows = sorted(set(self.order[step * self.batch : (step + self.every) * self.batch]))
        if not rows:
            return
        prompts = [material.prompts[row] for row in rows]
        for preset in self.presets:
            with at(model, preset):
                answers = self.lm.generate_tokens(prompts, max_tokens=self.max_tokens, label="renew")
            with at(model, FLOAT_PRESET):
                scored = score(self.lm, prompts, answers, top=self.top, label="renew, reference")
            renewed = material.rejected.setdefault(preset, list(material.rejected.get("", [None] * len(material))))
            for row, found in zip(rows, scored, strict=True):
                renewed[row] = found
        forget(model)


def forget(model: nn.Module) -> None:
    """Let go of decoded weights: those made in inference mode cannot be trained through."""
    for layer in latent_layers(model).values():
        for code in layer.codes.values():
            code.forget()  # type: ignore[operator]
