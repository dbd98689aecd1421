"""QDPO: the quantized model learns to prefer the float model's answer to its own (arXiv 2407.03051).

For a prompt with the float model's greedy answer w and the quantized model's l, both of which begin alike,

    m = [log q(w) - log p(w)] - [log q(l) - log p(l)],    loss = -log sigmoid(beta m)

with sums over response tokens, EOS included. What comes before the first divergence cancels and is never computed;
log p, the reference, comes from a cache in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from polybit.core.runtime import PolybitError
from polybit.train.distill import Distillation
from polybit.train.table import AnswerKnobs, PreferenceLoss


def token_logps(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """Log-probability of each target, [N]."""
    return logits_NV.gather(-1, target_N[:, None])[:, 0] - logits_NV.logsumexp(-1)


def sum_rows(values_N: Tensor, row_N: Tensor, rows: int) -> Tensor:
    """Sum per line of the batch, [B]."""
    return torch.zeros(rows, dtype=values_N.dtype, device=values_N.device).index_add(0, row_N, values_N)


def preference_loss(margin_B: Tensor, *, beta: float, kind: PreferenceLoss) -> Tensor:
    """Loss of each pair from its margin in nats.

    sigmoid: -log sigmoid(beta m), DPO (arXiv 2305.18290, eq. 7) and QDPO · ipo: (m - 1/(2 beta))^2, IPO
    (arXiv 2310.12036), with m a difference of means per token.
    """
    if kind == "sigmoid":
        return -logsigmoid(beta * margin_B)
    if kind == "ipo":
        return (margin_B - 1 / (2 * beta)).pow(2)
    raise PolybitError(f"preference loss {kind!r} is not known: choose sigmoid or ipo")


@dataclass(frozen=True)
class Preference:
    """The QDPO objective, summed over presets.

    beta: inverse temperature · kind: sigmoid (the paper's) or ipo · nll: weight of the mean negative log-likelihood of
    the float answers · distill, gamma: a distillation objective added with that weight (QDPO + KD) · shared: compute
    the common beginning of a pair once, in one row `[prefix | tail w | tail l]`.
    mean: margins of means per token instead of sums · anchor: times the nats by which a float answer is less likely
    than to the float model, taken off the margin (DPO-positive, arXiv 2402.13228): probability that leaves it costs.
    Pairs whose answers are the same (after a refresh) carry no loss and the mean is over the others.
    """

    beta: float = 0.1
    kind: PreferenceLoss = "sigmoid"
    nll: float = 0.0
    gamma: float = 0.0
    distill: Distillation | None = None
    shared: bool = False
    weights: Mapping[str, float] | None = None
    mean: bool = False
    anchor: float = 0.0
    separable: bool = True

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise PolybitError(f"beta {self.beta} is not possible: give a number above 0, usually 0.05 to 0.5")
        if self.shared and self.whole_answers:
            raise PolybitError("sharing the beginning of a pair leaves out its logits, which NLL and KD need: drop one")

    @property
    def needs(self) -> frozenset[str]:
        """Which parts of a batch it reads (material.Gather)."""
        tails = set() if self.whole_answers else {"tails"}
        return frozenset({"pairs", *tails, *({"joined"} if self.shared else ())})

    @property
    def whole_answers(self) -> bool:
        """Whether the float answers are needed from their first token on, not only from the divergence."""
        return bool(self.nll or (self.gamma and self.distill))

    def __call__(self, forward: Any, batch: Mapping[str, Any], presets: tuple[str, ...]) -> tuple[Tensor, dict]:
        """Loss over the active pairs and what to watch: reward accuracy, margin, log-probs per token."""
        total = torch.zeros(())
        logs: dict[str, float] = {}
        for preset in presets:
            loss, said = self.one(forward, batch, preset)
            total = total + loss * (self.weights or {}).get(preset, 1.0)
            logs |= {f"{preset}/{name}": value for name, value in said.items()}
        return total, logs

    def one(self, forward: Any, batch: Mapping[str, Any], preset: str) -> tuple[Tensor, dict[str, float]]:
        """The loss at one preset."""
        pairs = batch["pairs"][preset]
        active_B, chosen, rejected = pairs["active_B"], pairs["chosen"], pairs["rejected"]
        logits_NV = None
        if self.shared:
            both_NV = forward(pairs["joined"], preset).float()
            taken_N = pairs["joined"]["chosen_N"]
            w_N = token_logps(both_NV[taken_N], chosen["target_N"])
            l_N = token_logps(both_NV[~taken_N], rejected["target_N"])
        else:
            logits_NV = forward(chosen, preset).float()
            w_N = token_logps(logits_NV, chosen["target_N"])
            l_N = token_logps(forward(rejected, preset).float(), rejected["target_N"])
        margin_B = self.margins(w_N, l_N, pairs)
        count = active_B.sum().clamp(min=1)
        loss_B = preference_loss(margin_B, beta=self.beta, kind=self.kind)
        loss = torch.where(active_B, loss_B, 0.0).sum() / count
        logs = watch(margin_B, w_N, chosen, l_N, rejected, active_B)
        if self.nll:
            loss = loss - self.nll * w_N.mean()
        if self.gamma and self.distill is not None:
            assert logits_NV is not None
            distilled = self.distill.loss(logits_NV, chosen)
            loss, logs["kd"] = loss + self.gamma * distilled, float(distilled.detach())
        return loss, logs

    def margins(self, w_N: Tensor, l_N: Tensor, pairs: Mapping[str, Any]) -> Tensor:
        """m of every pair in nats, [B]; with ipo the difference of means per token.

        Unlike in IPO implementations, those means are over the tokens from the first divergence on.
        """
        sides = []
        for logq_N, part in ((w_N, pairs["chosen"]), (l_N, pairs["rejected"])):
            after_N = part["place_N"] >= pairs["star_B"][part["row_N"]]  # before the divergence both sides are equal
            gain_N = torch.where(after_N, logq_N - part["logp_N"], 0.0)
            gain_B = sum_rows(gain_N, part["row_N"], len(pairs["star_B"]))
            count_B = sum_rows(after_N.to(gain_N.dtype), part["row_N"], len(pairs["star_B"]))
            sides.append(gain_B / count_B.clamp(min=1) if self.kind == "ipo" or self.mean else gain_B)
        return sides[0] - sides[1] - self.anchor * (-sides[0]).clamp(min=0)


@torch.no_grad()
def watch(
    margin_B: Tensor,
    w_N: Tensor,
    chosen: Mapping[str, Tensor],
    l_N: Tensor,
    rejected: Mapping[str, Tensor],
    active_B: Tensor,
) -> dict[str, float]:
    """Numbers of the log. Accuracy says nothing about fidelity: it reaches 1 while flips grow (likelihood displacement,
    visible as a falling chosen log-probability)."""
    count = int(active_B.sum())
    won = torch.where(active_B, margin_B > 0, False)
    return {
        "accuracy": float(won.sum()) / max(count, 1),
        "margin": float(torch.where(active_B, margin_B, 0.0).sum()) / max(count, 1),
        "chosen": float((w_N - chosen["logp_N"]).mean()) if len(w_N) else 0.0,
        "rejected": float((l_N - rejected["logp_N"]).mean()) if len(l_N) else 0.0,
        "active": float(count) / max(len(active_B), 1),
    }


@dataclass(frozen=True)
class Stages:
    """Objectives one after another: (objective, steps) in order; the last one keeps to the end."""

    parts: Sequence[tuple[Any, int]]
    separable: bool = True

    def __call__(self, forward: Any, batch: Mapping[str, Any], presets: tuple[str, ...]) -> tuple[Tensor, dict]:
        """The objective of the batch's step."""
        return self.at(int(batch["step"]))(forward, batch, presets)

    @property
    def needs(self) -> frozenset[str]:
        """Which parts of a batch any of them reads."""
        return frozenset().union(*(objective.needs for objective, _ in self.parts))

    def at(self, step: int) -> Any:
        """The objective used at a step."""
        for objective, steps in self.parts:
            if step < steps:
                return objective
            step -= steps
        return self.parts[-1][0]


def qdpo(knobs: AnswerKnobs) -> Preference:
    """`--method qdpo`."""
    return Preference(knobs.beta, knobs.loss, nll=knobs.nll, anchor=knobs.anchor, shared=knobs.shared_prefix)


def qdpo_and_kd(knobs: AnswerKnobs) -> Preference:
    """`--method qdpo+kd`."""
    return replace(qdpo(knobs), gamma=knobs.gamma, distill=Distillation())


def kd_then_qdpo(knobs: AnswerKnobs) -> Stages:
    """`--method kd-then-qdpo`: distillation for half of the steps, then both."""
    half = knobs.steps // 2
    return Stages([(Distillation(), half), (qdpo_and_kd(knobs), knobs.steps - half)])
