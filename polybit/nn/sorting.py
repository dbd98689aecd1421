"""Put the hidden units of feed-forward layers in another order: the model computes the same, its columns are sorted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from polybit.nn.convert import Target

# names of the layers into the hidden units and of the one out of them, within one module
PAIRS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("fc_in",), "fc_out"),
    (("w1", "w3"), "w2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)


@dataclass(frozen=True, slots=True)
class FeedForward:
    """One feed-forward: the targets whose outputs are its hidden units, and the one that reads them."""

    into: tuple[Target, ...]
    out: Target


def feed_forwards(targets: Iterable[Target]) -> list[FeedForward]:
    """Every feed-forward between whose layers stands nothing but element-wise functions, by the names of its layers.

    Fused experts and layers that stack gate and up in one weight are left out.
    """
    by_name = {target.name: target for target in targets if target.kind in ("linear", "conv1d")}
    found = []
    for name, out in by_name.items():
        parent, _, leaf = name.rpartition(".")
        for wide, narrow in PAIRS:
            into = [by_name.get(f"{parent}.{other}".lstrip(".")) for other in wide]
            if leaf == narrow and all(t is not None and t.rows == out.columns for t in into):
                found.append(FeedForward(tuple(t for t in into if t is not None), out))
    return found


@torch.no_grad()
def sort_units(model: nn.Module, layers: FeedForward, order_I: Tensor) -> None:
    """Reorder the hidden units of one feed-forward in place: unit order_I[j] moves to place j.

    Rows (and biases) of the layers into them and columns of the layer out of them move together, so the function
    stays the same up to the order of a sum.
    """
    for target in layers.into:
        permute(target.parameter(model), 1 if target.kind == "conv1d" else 0, order_I)
        bias = getattr(model.get_submodule(target.module_name), "bias", None)
        if isinstance(bias, Tensor):
            permute(bias, 0, order_I)
    permute(layers.out.parameter(model), 0 if layers.out.kind == "conv1d" else 1, order_I)


def permute(tensor: Tensor, axis: int, order_I: Tensor) -> None:
    """Reorder a tensor along one axis in place."""
    tensor.copy_(tensor.index_select(axis, order_I.to(tensor.device)))
