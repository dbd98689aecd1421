"""Distillation losses that were tried against plain KD; what earns its place moves to polybit/train/distill.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from polybit.train.distill import Distillation, kl, lead_shortfall, with_rest


@dataclass(frozen=True)
class Variant(Distillation):
    """KD with further knobs, each off at 0.

    skew: KL(p || (1 - skew) q + skew p), DistiLLM's (arXiv 2402.03898) · contests: weight of the divergence between the
    two models' preferences in every contest of the teacher's token with a rival, a soft and calibrated form of token
    preferences, beside (1 - contests) KL · variation: weight of the total variation distance in place of as much KL ·
    head: KL over the `head` likeliest tokens and one bin of the rest, weight 1 · early: tokens count exp(-place/early)
    · both: share of the loss on the model's own renewed answers (forward KL).
    """

    skew: float = 0.0
    contests: float = 0.0
    variation: float = 0.0
    head: float = 0.0
    early: float = 0.0
    both: float = 0.0

    @property
    def needs(self) -> frozenset[str]:
        """Both kinds of answers where both count."""
        return frozenset({"chosen", "own"}) if self.both else super().needs

    def __call__(self, forward: Any, batch: Any, presets: tuple[str, ...]) -> tuple[Tensor, dict]:
        """As Distillation; with `both`, also on the model's own answers."""
        total, logs = super().__call__(forward, batch, presets)
        if not self.both:
            return total, logs
        total = (1 - self.both) * total
        for preset in presets:
            part = batch["own"][preset]
            total = total + self.both * self.loss(forward(part, preset).float(), part)
        return total, logs

    def loss(self, logits_NV: Tensor, part: Any) -> Tensor:
        """The mean over tokens of what the knobs ask for, and plain KD's other parts."""
        if not (self.skew or self.contests or self.variation or self.head or self.early):
            return super().loss(logits_NV, part)
        teacher_NK, index_NK = part["top_logp_NK"], part["top_index_NK"].long()
        logq_NV = logits_NV.log_softmax(-1)
        student_NK = logq_NV.gather(-1, index_NK)
        whole = index_NK.shape[-1] == logits_NV.shape[-1]
        both = (teacher_NK, student_NK) if whole else (with_rest(teacher_NK), with_rest(student_NK))
        if self.head:
            k = int(self.head)
            both = with_rest(teacher_NK[:, :k]), with_rest(student_NK[:, :k])
        if self.skew:
            a, b = torch.tensor(self.skew).log(), torch.tensor(1 - self.skew).log()
            mixed = torch.logaddexp(both[1] + b, both[0].clamp(min=-60) + a)
            each_N = kl(both[0], mixed)
        else:
            each_N = kl(*both)
        if self.variation:
            apart_N = 0.5 * (both[0].exp() - both[1].exp()).abs().sum(-1)
            each_N = (1 - self.variation) * each_N + self.variation * apart_N
        if self.contests:
            each_N = (1 - self.contests) * each_N + self.contests * contests(teacher_NK, student_NK)
        if self.early:
            weight_N = torch.exp(-part["place_N"].float() / self.early)
            each_N = each_N * weight_N / weight_N.mean()
        best = part["top_logp_NK"], part["top_index_NK"]
        return each_N.mean() + (self.hinge * lead_shortfall(logits_NV, *best).mean() if self.hinge else 0.0)


def contests(teacher_NK: Tensor, student_NK: Tensor, rivals: int = 16) -> Tensor:
    """Sum over the teacher's token's rivals j of (p_1 + p_j) KL between the two models' choices in {1, j}; [N]."""
    t_NJ = teacher_NK[:, :1] - teacher_NK[:, 1 : rivals + 1]
    s_NJ = student_NK[:, :1] - student_NK[:, 1 : rivals + 1]
    p_NJ = t_NJ.sigmoid()
    apart_NJ = p_NJ * (logsigmoid(t_NJ) - logsigmoid(s_NJ)) + (1 - p_NJ) * (logsigmoid(-t_NJ) - logsigmoid(-s_NJ))
    return ((teacher_NK[:, :1].exp() + teacher_NK[:, 1 : rivals + 1].exp()) * apart_NJ).sum(-1)
