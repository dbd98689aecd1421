"""How the gradients of several widths are put together, so that the narrowest does not decide alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from polybit.core.runtime import PolybitError
from polybit.train.table import Share

Gradient = list[Tensor | None]


@dataclass(frozen=True, slots=True)
class Balance:
    """how: "sum" adds the weighted gradients; "loss" weights each by 1/its KL at the start (`settled`); "gradient"
    first brings each to length 1; "project" does so and then takes from each the part that works against another
    (PCGrad, arXiv 2001.06782, in a fixed order, on whole models).

    weights: preset -> factor (default 1). A plain sum serves the lowest width: its loss and its gradient are an order
    of magnitude larger than those of the widest.
    """

    how: Share = "sum"
    weights: Mapping[str, float] = field(default_factory=dict)


def inverse_losses(losses: Mapping[str, float]) -> dict[str, float]:
    """Weights proportional to 1/loss at the start with mean 1, so that every width begins with an equal share."""
    inverse = {name: 1 / max(loss, 1e-8) for name, loss in losses.items()}
    mean = sum(inverse.values()) / len(inverse)
    return {name: value / mean for name, value in inverse.items()}


def settled(balance: Balance, start: Mapping[str, Mapping[str, float]]) -> Balance:
    """The balance once the numbers at the start are known: "loss" becomes a weighted sum."""
    if balance.how != "loss":
        return balance
    if not start:
        raise PolybitError("gradients can only be shared by loss when the start is probed: give probes of 1 or more")
    return Balance("sum", inverse_losses({name: numbers["kl"] for name, numbers in start.items()}))


def combine(gradients: Sequence[Gradient], presets: Sequence[str], balance: Balance) -> Gradient:
    """One gradient from those of the presets; a parameter no preset touches stays None."""
    factors = [balance.weights.get(name, 1.0) for name in presets]
    if balance.how != "sum":
        norms = [length(gradient) for gradient in gradients]
        factors = [factor / max(norm, 1e-30) for factor, norm in zip(factors, norms, strict=True)]
    scaled = [
        [None if g is None else g * factor for g in gradient]
        for gradient, factor in zip(gradients, factors, strict=True)
    ]
    if balance.how == "project":
        scaled = [without_conflict(gradient, scaled, index) for index, gradient in enumerate(scaled)]
    return [add(parts) for parts in zip(*scaled, strict=True)]


def length(gradient: Gradient) -> float:
    """Euclidean length over all parameters."""
    return float(torch.stack([whole(g.float().pow(2).sum()) for g in gradient if g is not None]).sum().sqrt())


def without_conflict(gradient: Gradient, others: Sequence[Gradient], index: int) -> Gradient:
    """The gradient minus its component along every other one that points against it."""
    found = list(gradient)
    for number, other in enumerate(others):
        if number == index:
            continue
        product = dot(found, other)
        size = dot(other, other)
        if product < 0 and size > 0:
            found = [
                a if a is None or b is None else a - b * (product / size) for a, b in zip(found, other, strict=True)
            ]
    return found


def dot(one: Gradient, other: Gradient) -> float:
    """Inner product over all parameters both touch."""
    products = [whole((a * b).sum()) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return float(torch.stack(products).sum()) if products else 0.0


def add(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The sum of those that are there."""
    there = [part for part in parts if part is not None]
    return reduce(torch.add, there) if there else None


def whole(value: Tensor) -> Tensor:
    """A sum over rows that are spread over processes, as one number."""
    return value.full_tensor() if isinstance(value, DTensor) else value
