"""Gradient steps over latents, told while they are taken, and kept now and then so that a killed run goes on.

A run that takes up a kept state ends in the same bits: the state is exact, and batches come in an order of the seed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from polybit.core.runtime import Advance

KEEP_EVERY = 300.0  # seconds between two states that are kept; writing one takes a second or two per GB


class KeptState(Protocol):
    """Where the state of long training is kept: hub.workspace.Workspace.state, or nowhere."""

    def read(self) -> Mapping[str, Tensor] | None:
        """What was kept last, None when nothing was."""
        ...

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Keep a state in the place of the last one."""
        ...


def untold(amount: float, *, found: bool = False) -> None:
    """An Advance that nobody sees."""


def descend(
    groups: Sequence[tuple[Sequence[Tensor], float]],
    steps: int,
    loss: Callable[[int], Tensor],
    *,
    share: Callable[[int], float],
    after: Callable[[], None],
    kept: KeptState | None = None,
    told: Advance = untold,
) -> None:
    """Take `steps` of Adam on some tensors, in place.

    groups: (tensors, learning rate) · loss: of a step, a scalar · share: of the learning rate at a step · after: what
    follows every step · kept: where the state lies; told: is called with 1 for every step, those found there too
    """
    moved = [tensor for tensors, _ in groups for tensor in tensors]
    adam = torch.optim.Adam(
        [{"params": list(tensors), "rate": rate} for tensors, rate in groups if tensors],
        lr=0.0,
        betas=(0.9, 0.99),
        eps=1e-12,
    )
    first = take_up(adam, moved, None if kept is None else kept.read())
    told(first, found=True)
    said = time.monotonic()
    for step in range(first, steps):
        for group in adam.param_groups:
            group["lr"] = group["rate"] * share(step)
        adam.zero_grad()
        loss(step).backward()
        adam.step()
        after()
        told(1)
        if kept is not None and time.monotonic() - said >= KEEP_EVERY and step + 1 < steps:
            kept.write(state_of(adam, moved, step + 1))
            said = time.monotonic()


def state_of(adam: torch.optim.Adam, moved: Sequence[Tensor], step: int) -> dict[str, Tensor]:
    """All that the next step depends on."""
    state = {"step": torch.tensor(step)}
    for number, tensor in enumerate(moved):
        state[f"{number}.value"] = tensor.detach()
        state |= {f"{number}.{name}": part for name, part in moments(adam, tensor)}
    return state


def moments(adam: torch.optim.Adam, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """What Adam knows of a tensor; nothing before its first gradient."""
    yield from adam.state.get(tensor, {}).items()


@torch.no_grad()
def take_up(adam: torch.optim.Adam, moved: Sequence[Tensor], state: Mapping[str, Tensor] | None) -> int:
    """Put a kept state in the place of the start; how many steps lie behind it (0: none was kept)."""
    if state is None:
        return 0
    for number, tensor in enumerate(moved):
        tensor.copy_(state[f"{number}.value"])
        known = {key.partition(".")[2]: part for key, part in state.items() if key.startswith(f"{number}.")}
        del known["value"]
        if known:
            adam.state[tensor] = {
                name: part if name == "step" else part.to(tensor.device) for name, part in known.items()
            }
    return int(state["step"])
