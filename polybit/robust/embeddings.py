"""Perturbed embeddings: projected gradient ascent, and adversarial training as a wrapper around any objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from polybit.core.runtime import PolybitError
from polybit.robust.gradients import embedding_matrix, nudged

Forward = Callable[[Mapping[str, Tensor], str], Tensor]
Objective = Callable[[Forward, Any, tuple[str, ...]], tuple[Tensor, Mapping[str, float | Tensor]]]


def project(delta_BTD: Tensor, radius: float) -> Tensor:
    """Every token's change back into a ball of that radius."""
    norm_BT1 = delta_BTD.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return delta_BTD * (radius / norm_BT1).clamp_max(1.0)


def ascend(
    model: nn.Module,
    loss: Callable[[], Tensor],
    free_BT: Tensor,
    *,
    radius: float,
    iterations: int = 3,
    seed: int = 0,
) -> Tensor:
    """The change of the input embeddings, float32 [B, T, D], within `radius` per token, that raises `loss` most.

    PGD (Madry et al., ICLR 2018) on embeddings: a random start, then `iterations` steps of 2.5 * radius / iterations
    along each token's own gradient direction, projected back. `loss()` runs the model on the batch; free_BT: True where
    a token may change. The parameters get no gradient.
    """
    width = embedding_matrix(model).shape[1]
    generator = torch.Generator().manual_seed(seed)
    mask_BT1 = free_BT[..., None].float()
    start = torch.randn(*free_BT.shape, width, generator=generator).to(free_BT.device)
    delta_BTD = project(start, radius) * torch.rand((), generator=generator).item() * mask_BT1
    for _ in range(iterations):
        delta_BTD = delta_BTD.detach().requires_grad_()
        with torch.enable_grad(), nudged(model, delta_BTD):
            value = loss()
            slope = torch.autograd.grad(value, delta_BTD, allow_unused=True)[0] if value.requires_grad else None
        if slope is None:
            raise PolybitError(
                f"no gradient reaches the input embeddings of {type(model).__name__}: train a float model or one made "
                "trainable"
            )
        with torch.no_grad():
            direction = slope / slope.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            step = 2.5 * radius / iterations
            delta_BTD = project(delta_BTD + step * direction, radius) * mask_BT1
    return delta_BTD.detach()


@dataclass(slots=True)
class Adversarial:
    """Any objective, on inputs whose embeddings were changed against it; the preset of a step is the one attacked.

    RPT (Double-Win Quant, Fu et al., ICML 2021, algorithm 1) is this with a schedule that draws one preset per step:
    the change is made against the precision that is then trained. Unlike the paper, which perturbs pixels, embeddings
    are moved, by at most `epsilon` times their mean length per token, and only those of tokens that are not learnt.
    clean: weight of the objective on the unchanged batch beside the attacked one.
    """

    inner: Objective
    model: nn.Module
    epsilon: float = 0.05
    iterations: int = 3
    clean: float = 0.5
    seed: int = 0
    separable: bool = True
    steps: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 10 or self.iterations < 1 or not 0 <= self.clean < 1:
            raise PolybitError(
                f"adversarial training with epsilon {self.epsilon}, {self.iterations} iterations and clean share "
                f"{self.clean} is not possible: give 0 < epsilon < 10, 1 or more iterations, 0 <= clean < 1"
            )

    def __call__(
        self, forward: Forward, batch: Any, presets: tuple[str, ...]
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """Loss of the attacked batch (and of the clean one), and both parts for the log."""
        self.steps += 1
        total: Any = 0.0
        logs: dict[str, float | Tensor] = {}
        radius = self.epsilon * float(embedding_matrix(self.model).norm(dim=1).mean())
        free_BT = batch["ids_BT"].new_ones(batch["ids_BT"].shape).bool()
        if "mask_BT" in batch:
            free_BT = free_BT & batch["mask_BT"].bool()
        if "learn_BT" in batch:
            free_BT = free_BT & ~batch["learn_BT"].bool()
        for name in presets:
            # a new mapping each time, so that an objective that remembers a batch's logits does not mix them up
            delta = ascend(
                self.model,
                lambda name=name: self.inner(forward, dict(batch), (name,))[0],  # type: ignore[misc]
                free_BT,
                radius=radius,
                iterations=self.iterations,
                seed=self.seed + self.steps,
            )
            with nudged(self.model, delta):
                attacked, _ = self.inner(forward, dict(batch), (name,))
            logs[f"{name}/attacked"] = attacked.detach()
            total = total + (1 - self.clean) * attacked
            if self.clean:
                plain, parts = self.inner(forward, dict(batch), (name,))
                logs |= parts
                total = total + self.clean * plain
        return total, logs
