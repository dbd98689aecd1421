"""Distillation: the quantized model learns the float model's distribution at every token of an answer.

Teacher distributions come from a cache (material.py), whole or as the K likeliest tokens and one bin for the rest, so
that no float model is in memory. Weights that look at flips – thin margins, the place where answers part – are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from polybit.core.runtime import PolybitError
from polybit.train.table import AnswerKnobs

Divergence = Literal["forward", "reverse", "jensen"]
Focus = Literal["none", "margin", "doubt", "path", "path+doubt"]
SMALLEST = -60.0  # log of the least probability the bin of the rest may have


def token_divergence(
    logits_NV: Tensor, top_logp_NK: Tensor, top_index_NK: Tensor, kind: Divergence = "forward", *, sharpen: float = 1.0
) -> Tensor:
    """Divergence between teacher and student at each token, nats [N].

    "forward" is KL(teacher || student), "reverse" KL(student || teacher), "jensen" the mean of both against their
    mixture. With K below the vocabulary both are taken over the K tokens and one bin of all others, which is a lower
    bound of the whole. sharpen > 1 raises both distributions to that power and normalises them again, over the K tokens
    only: as it grows, the divergence becomes a count of flips.
    """
    index_NK = top_index_NK.long()
    teacher_NK, student_NK = top_logp_NK, logits_NV.log_softmax(-1).gather(-1, index_NK)
    if sharpen != 1.0:
        teacher_NK = (teacher_NK * sharpen).log_softmax(-1)
        student_NK = (student_NK * sharpen).log_softmax(-1)
    elif index_NK.shape[-1] < logits_NV.shape[-1]:
        teacher_NK, student_NK = with_rest(teacher_NK), with_rest(student_NK)
    if kind == "forward":
        return kl(teacher_NK, student_NK)
    if kind == "reverse":
        return kl(student_NK, teacher_NK)
    middle_NK = torch.logaddexp(teacher_NK, student_NK) - torch.log(torch.tensor(2.0))
    return (kl(teacher_NK, middle_NK) + kl(student_NK, middle_NK)) / 2


def kl(logp_NK: Tensor, logq_NK: Tensor) -> Tensor:
    """KL(p || q) over the last axis; entries of probability 0 (logp = -inf) count nothing."""
    known_NK = logp_NK > SMALLEST
    return torch.where(known_NK, logp_NK.exp() * (logp_NK - logq_NK), 0.0).sum(-1)


def with_rest(logp_NK: Tensor) -> Tensor:
    """Add the bin of all tokens that are not listed: log(1 - sum p)."""
    listed_N1 = logp_NK.logsumexp(-1, keepdim=True).clamp(max=-1e-7)
    rest_N1 = torch.log(-torch.expm1(listed_N1)).clamp(min=SMALLEST)
    return torch.cat([logp_NK, rest_N1], dim=-1)


@torch.no_grad()
def flip_weights(logits_NV: Tensor, part: Mapping[str, Tensor], focus: Focus, strength: float) -> Tensor:
    """A weight per token with mean 1, from where flips happen; no gradient passes through it.

    "margin": 1 + strength (1 - m), m the teacher's margin between its two likeliest tokens · "doubt": 1 + strength
    where the student's own lead of the teacher's token over the next is thin or negative, fading as exp(-lead), so that
    what is flipped or about to flip counts most · "path": the probability that greedy answers have not parted before
    this token, estimated as exp(-strength x flips so far in this answer): text after a flip is never reached ·
    "path+doubt": their product.
    """
    if focus == "none":
        return torch.ones_like(part["logp_N"])
    teacher_NK = part["top_logp_NK"][:, :2].exp()
    best_N = part["top_index_NK"][:, 0].long()
    weight_N = torch.ones_like(teacher_NK[:, 0])
    if focus == "margin":
        weight_N = 1 + strength * (1 - (teacher_NK[:, 0] - teacher_NK[:, 1]))
    if "doubt" in focus:
        lead_N = logits_NV.gather(-1, best_N[:, None])[:, 0] - strongest_other(logits_NV, best_N)
        weight_N = 1 + strength * torch.exp(-lead_N.clamp(min=0.0))
    if "path" in focus:
        weight_N = weight_N * torch.exp(-min(strength, 1.0) * flips_before(logits_NV, best_N, part))
    return weight_N / weight_N.mean()


def strongest_other(logits_NV: Tensor, best_N: Tensor) -> Tensor:
    """The largest logit of any token but `best`, [N]."""
    top_N2 = logits_NV.topk(2, dim=-1)
    return torch.where(top_N2.indices[:, 0] == best_N, top_N2.values[:, 1], top_N2.values[:, 0])


def flips_before(logits_NV: Tensor, best_N: Tensor, part: Mapping[str, Tensor]) -> Tensor:
    """How many tokens of the same answer, before this one, the student would have chosen otherwise; [N]."""
    flip_N = (logits_NV.argmax(-1) != best_N).float()
    total_N = flip_N.cumsum(0) - flip_N
    first_N = torch.searchsorted(part["row_N"], part["row_N"])  # rows are ascending: where this answer begins
    return total_N - total_N[first_N]


@dataclass(frozen=True)
class Distillation:
    """The objective of distillation, summed over presets.

    answers: "chosen" (the float model's) or "own" (the quantized model's, renewed while training: on-policy) ·
    kind: which divergence · focus, strength: `flip_weights` · sharp: share of the loss that compares sharpened
    distributions (`token_divergence`), with the power `sharpen` · hinge: weight of a penalty on leads thinner than the
    teacher's · weights: preset -> factor.

    Source: Hinton et al. (arXiv 1503.02531); on-policy and reverse: GKD (arXiv 2306.13649).
    """

    answers: Literal["chosen", "own"] = "chosen"
    kind: Divergence = "forward"
    focus: Focus = "none"
    strength: float = 1.0
    sharp: float = 0.0
    sharpen: float = 2.0
    hinge: float = 0.0
    weights: Mapping[str, float] | None = None
    separable: bool = True

    def __post_init__(self) -> None:
        for name, value, allowed in (("kind", self.kind, Divergence), ("focus", self.focus, Focus)):
            if value not in get_args(allowed):
                raise PolybitError(f"{name} {value!r} is not known: choose one of {', '.join(get_args(allowed))}")

    @property
    def needs(self) -> frozenset[str]:
        """Which parts of a batch it reads (material.Gather)."""
        return frozenset({self.answers})

    def __call__(self, forward: Any, batch: Mapping[str, Any], presets: tuple[str, ...]) -> tuple[Tensor, dict]:
        """Mean over response tokens, summed over presets."""
        logs: dict[str, float] = {}
        total = torch.zeros(())
        for preset in presets:
            part = batch["chosen"] if self.answers == "chosen" else batch["own"][preset]
            logits_NV = forward(part, preset).float()
            loss = self.loss(logits_NV, part)
            logs[f"{preset}/kd"] = float(loss.detach())
            total = total + loss * (self.weights or {}).get(preset, 1.0)
        return total, logs

    def loss(self, logits_NV: Tensor, part: Mapping[str, Tensor]) -> Tensor:
        """The weighted mean over the tokens of one batch."""
        best = part["top_logp_NK"], part["top_index_NK"]
        each_N = token_divergence(logits_NV, *best, self.kind)
        if self.sharp:
            sharp_N = token_divergence(logits_NV, *best, self.kind, sharpen=self.sharpen)
            each_N = (1 - self.sharp) * each_N + self.sharp * sharp_N / self.sharpen
        loss = (each_N * flip_weights(logits_NV, part, self.focus, self.strength)).mean()
        return loss + self.hinge * lead_shortfall(logits_NV, *best).mean() if self.hinge else loss


def lead_shortfall(logits_NV: Tensor, top_logp_NK: Tensor, top_index_NK: Tensor) -> Tensor:
    """How much less the student prefers the teacher's token to its strongest rival than the teacher prefers it to its
    own second, squared where it lies below, capped at a lead of 1 nat; [N]. Zero for a student equal to the teacher."""
    best_N = top_index_NK[:, 0].long()
    lead_N = logits_NV.gather(-1, best_N[:, None])[:, 0] - strongest_other(logits_NV, best_N)
    wanted_N = (top_logp_NK[:, 0] - top_logp_NK[:, 1]).clamp(max=1.0)
    return (wanted_N - lead_N).clamp(min=0.0).pow(2)


# the fewest flips of those tried, at a worse KL than plain (docs/results/beyond-distillation.md)
FLIP_AWARE = Distillation(hinge=0.1)


def kd(knobs: AnswerKnobs) -> Distillation:
    """`--method kd`."""
    return Distillation()


def kd_own(knobs: AnswerKnobs) -> Distillation:
    """`--method kd-own`: on-policy."""
    return Distillation(answers="own", kind="reverse")


def flip(knobs: AnswerKnobs) -> Distillation:
    """`--method flip`."""
    return FLIP_AWARE
