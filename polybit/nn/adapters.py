"""Low-rank adapters beside quantized layers, one set per preset: switching the preset switches the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from polybit.core.runtime import PolybitError
from polybit.nn.board import board_of
from polybit.nn.linear import QuantLinear


class Lora(nn.Module):
    """y + (alpha / r) B A x, a plain adapter (LoRA, arXiv 2106.09685) of one preset."""

    def __init__(
        self,
        rows: int,
        columns: int,
        rank: int,
        like: Tensor,
        *,
        alpha: float | None = None,
        draw: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.alpha = float(rank if alpha is None else alpha)
        down_RI = nn.init.kaiming_uniform_(torch.empty(rank, columns, device="cpu"), a=sqrt(5), generator=draw)
        self.down_RI = nn.Parameter(down_RI.to(like))
        self.up_OR = nn.Parameter(like.new_zeros(rows, rank))

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the layer's output."""
        down_RI, up_OR = self.down_RI.to(x.dtype), self.up_OR.to(x.dtype)
        return linear(linear(x, down_RI), up_OR) * (self.alpha / len(self.down_RI))

    def nbytes(self) -> int:
        """Bytes of both factors as they are saved, in 16-bit floats."""
        return 2 * (self.down_RI.numel() + self.up_OR.numel())


def plug(model: nn.Module, adapters: Mapping[str, Mapping[str, Lora]]) -> None:
    """Attach adapters (layer name -> preset -> adapter) to the quantized layers of a model.

    They are no part of the model's own state: the checkpoint stays a pure quantized one, adapters are files beside it.
    The layer adds the adapter in the same call as its product (`QuantLinear.set_adapter`).
    """
    board = board_of(model)
    for name, loras in adapters.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, QuantLinear):
            raise PolybitError(f"an adapter is meant for {name!r:.120}, which is no quantized layer: use its own model")
        for preset, lora in loras.items():
            wanted, found = (layer.rows, layer.columns), (lora.up_OR.shape[0], lora.down_RI.shape[1])
            if wanted != found:
                raise PolybitError(f"the adapter of {name!r:.120} is for shape {found}, the layer has {wanted}")
            layer.set_adapter(preset, lora.down_RI, lora.up_OR, lora.alpha / len(lora.down_RI))
        board.adapted[name] = layer


def plugged(model: nn.Module) -> dict[str, dict[str, Lora]]:
    """The adapters of a model: preset -> layer name -> adapter."""
    found: dict[str, dict[str, Lora]] = {}
    for name, layer in board_of(model).adapted.items():
        for preset, adapter in getattr(layer, "adapters", {}).items():  # a layer in training keeps its own
            rank = len(adapter.down_RI)
            lora = Lora(adapter.rows, adapter.columns, rank, adapter.down_RI, alpha=adapter.scale * rank)
            lora.load_state_dict({"down_RI": adapter.down_RI, "up_OR": adapter.up_OR})
            found.setdefault(preset, {})[name] = lora.requires_grad_(False)
    return found


def worn(model: nn.Module) -> dict[str, Lora]:
    """The adapters that are in use, by the name of their layer."""
    board = board_of(model)
    return {} if board.worn is None else plugged(model).get(board.worn, {})


def worn_bytes(layer: Any) -> int:
    """Bytes that a layer's adapter in use adds to a forward pass."""
    adapter = getattr(layer, "adapter", None)
    return 0 if adapter is None else int(adapter.nbytes())


def wear(model: nn.Module, preset: str | None) -> None:
    """Let every layer use the adapter of a preset; None or a preset without adapters: none."""
    board = board_of(model)
    board.worn = preset if board.adapted else None
    for layer in board.adapted.values():
        layer.wear(preset)
