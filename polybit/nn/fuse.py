"""Layers that share their input (q/k/v, gate/up) multiply in one call: the first to be asked computes for the others.

Who shares an input is not read from names but seen: quantized layers of one module are watched during a forward pass,
and those that were given the very tensor another was given just before follow it from the next pass on. A follower
takes what was computed for it only if it is asked with that tensor, unchanged, at the precision it was computed at;
in every other case it multiplies by itself. The numbers are those of separate calls, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from polybit.core.precision import FLOAT
from polybit.kernels.prepared import Bundle, Prepared, is_plain
from polybit.kernels.reference import chunk_of
from polybit.nn.linear import QuantLinear

PATIENCE = 3  # results nobody fetched, after which a layer is no longer computed for


@dataclass(slots=True)
class SharedInput:
    """The layer that was last given a new tensor, and those that were given the same one since."""

    leader: QuantLinear
    x: Any  # a weak reference
    mark: Any
    followers: list[QuantLinear] = field(default_factory=list)


class Siblings:
    """Quantized layers of one module with equally many inputs, and what is known of who shares them."""

    def __init__(self) -> None:
        self.seen: SharedInput | None = None
        self.follow: dict[QuantLinear, tuple[QuantLinear, ...]] = {}
        self.misses: dict[QuantLinear, int] = {}
        self.bundles: dict[QuantLinear, tuple[tuple[Prepared, ...], Bundle | None]] = {}
        self.ready: tuple[Tensor, Any, dict[QuantLinear, tuple[tuple[Any, ...], Tensor]]] | None = None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # copies of the layers are other layers: they multiply by themselves

    def multiply(self, layer: QuantLinear, x: Tensor) -> Tensor | None:
        """What `layer` gives for x, its siblings' part kept for them; None when it must multiply by itself."""
        if not x.is_cpu:
            return None  # only the compiled kernels have such calls, and watching would wait for the device
        ready = self.ready
        if ready is not None and ready[0] is x and layer in ready[2]:
            made_at, y = ready[2].pop(layer)
            if not ready[2]:
                self.ready = None
            if made_at == settings(layer) and ready[1] == written(x):
                return y
        followers = self.follow.get(layer)
        if followers is None:
            followers = self.watch(layer, x)
        return self.compute(layer, followers, x) if followers else None

    def watch(self, layer: QuantLinear, x: Tensor) -> tuple[QuantLinear, ...] | None:
        """Learn who is given the same tensor; the followers of `layer` as soon as they are known."""
        seen = self.seen
        if seen is not None and seen.x() is x and layer is not seen.leader and unchanged(seen.mark, x):
            seen.followers.append(layer)
            return None
        if seen is not None:
            self.follow[seen.leader] = tuple(seen.followers)
        self.seen = SharedInput(layer, ref(x), mark(x))
        return self.follow.get(layer)

    def compute(self, leader: QuantLinear, followers: Iterable[QuantLinear], x: Tensor) -> Tensor | None:
        """Multiply `leader` and its followers in one call, or None when they differ in how they multiply."""
        if self.ready is not None:
            self.forgive(leader, self.ready[2])
        members = [leader, *(f for f in followers if alike(leader, f))]
        if len(members) < 2 or not leader.is_fast(x) or not is_plain(x, leader.columns):
            return None
        prepared = tuple([member.prepared() for member in members])
        known = self.bundles.get(leader)
        if (
            known is None
            or len(known[0]) != len(prepared)
            or any(a is not b for a, b in zip(known[0], prepared, strict=True))
        ):
            known = (prepared, Bundle(prepared) if Bundle.fits(prepared) else None)
            self.bundles[leader] = known
        if known[1] is None:
            return None
        readings = [member.reading for member in members]
        adapters = [member.adapter for member in members]
        biases = [member.bias for member in members]
        first, *others = known[1].linear(x, readings, biases, leader.arithmetic, adapters)
        kept = {member: (settings(member), y) for member, y in zip(members[1:], others, strict=True)}
        self.ready = (x, written(x), kept)
        return first

    def forgive(self, leader: QuantLinear, left: Iterable[QuantLinear]) -> None:
        """Let results go that nobody fetched; whoever does so again and again is no longer computed for."""
        self.ready = None
        for layer in left:
            self.misses[layer] = self.misses.get(layer, 0) + 1
            if self.misses[layer] >= PATIENCE:
                for leading, followers in self.follow.items():
                    self.follow[leading] = tuple(f for f in followers if f is not layer)


def settings(layer: QuantLinear) -> tuple[Any, ...]:
    """What a layer's result depends on beside its input."""
    return (layer.precision, layer.offsets, layer.arithmetic, layer.adapter, layer.keep)


def alike(leader: QuantLinear, other: QuantLinear) -> bool:
    """Whether two layers can round their input together now."""
    floats = leader.precision.a == FLOAT == other.precision.a
    trains = other.adapter is not None and other.adapter.trains()
    return floats and not trains and not other.keep and other.arithmetic == leader.arithmetic


def written(x: Tensor) -> int | None:
    """Changes when a tensor is written to; None where torch does not count (tensors made in inference mode)."""
    return None if x.is_inference() else x._version


def mark(x: Tensor) -> Any:
    """What tells later whether a tensor was written to: its count, or a copy where there is none."""
    return x.clone() if x.is_inference() else x._version


def unchanged(before: Any, x: Tensor) -> bool:
    """Whether a tensor is still what `mark` saw. A module that leaves its input alone once does so always."""
    return bool(torch.equal(before, x)) if isinstance(before, Tensor) else before == x._version


def fuse(model: nn.Module) -> nn.Module:
    """Let the quantized layers of each module of `model` find out who shares an input, and multiply together."""
    for parent in model.modules():
        families: dict[tuple[int, int], list[QuantLinear]] = {}
        for layer in parent.children():
            if type(layer) is QuantLinear:
                families.setdefault((layer.columns, chunk_of(layer.fields.group_size)), []).append(layer)
        for family in families.values():
            if len(family) > 1 and any(layer.siblings is None for layer in family):
                siblings = Siblings()
                for layer in family:
                    layer.siblings = siblings
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Let every layer multiply by itself."""
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            layer.siblings = None
    return model
