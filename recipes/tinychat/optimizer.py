"""Muon for the matrices inside the blocks, equal shapes stacked so that a step costs few calls.

Source: Jordan et al., Muon (2024), https://kellerjordan.github.io/posts/muon/. `torch.optim.Muon` treats the matrices
one by one; on 128-wide matrices most of its time would be call overhead.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(update_NOI: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of every stacked wide matrix towards one (Newton-Schulz iteration)."""
    a, b, c = COEFFICIENTS
    update_NOI = update_NOI / (update_NOI.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram_NOO = update_NOI @ update_NOI.mT
        polynomial_NOO = torch.baddbmm(gram_NOO, gram_NOO, gram_NOO, beta=b, alpha=c)
        update_NOI = torch.baddbmm(update_NOI, polynomial_NOO, update_NOI, beta=a)
    return update_NOI


class StackedMuon:
    """Nesterov momentum, orthogonalised; `parts` says of how many matrices a held-together parameter consists."""

    def __init__(
        self, parameters: dict[str, tuple[Tensor, int]], *, momentum: float = 0.95, decay: float = 0.05
    ) -> None:
        self.momentum, self.decay = momentum, decay
        self.groups: dict[tuple[int, int], list[Tensor]] = {}
        self.parameters = [parameter for parameter, _ in parameters.values()]
        for parameter, parts in parameters.values():
            rows, columns = parameter.shape[0] // parts, parameter.shape[1]
            self.groups.setdefault((rows, columns), []).append(parameter)
        self.buffers = {
            key: torch.zeros(sum(p.shape[0] for p in group) // key[0], *key) for key, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for (rows, columns), group in self.groups.items():
            gradient_NOI = torch.cat([p.grad for p in group]).view(-1, rows, columns)
            momentum_NOI = self.buffers[rows, columns].lerp_(gradient_NOI, 1 - self.momentum)
            update_NOI = gradient_NOI.lerp(momentum_NOI, self.momentum)
            tall = rows > columns
            update_NOI = orthogonalise(update_NOI.mT.contiguous() if tall else update_NOI)
            flat_OI = (update_NOI.mT if tall else update_NOI).reshape(-1, columns)
            scale = max(1.0, rows / columns) ** 0.5
            for parameter, change_OI in zip(group, flat_OI.split([p.shape[0] for p in group]), strict=True):
                parameter.mul_(1 - rate * self.decay).add_(change_OI, alpha=-rate * scale)

    def state(self) -> dict[str, Tensor]:
        """Momentum buffers under names that say their shape."""
        return {f"muon.{rows}x{columns}": buffer for (rows, columns), buffer in self.buffers.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        for rows, columns in self.buffers:
            self.buffers[rows, columns].copy_(state[f"muon.{rows}x{columns}"])
