"""A model's forward that begins behind some of its blocks: what follows is the model's own, whatever it does there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from polybit.compress.unlike import Captured


@contextmanager
def entered(modules: nn.ModuleList, start: int, hidden_BTD: Tensor, wraps: bool) -> Iterator[None]:
    """Inside, the model's forward passes over the blocks before `start` and hands `hidden_BTD` to that one.

    With `start` behind the last block all are passed over and what follows them gets `hidden_BTD`.
    """

    def skip(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given,) if wraps else given

    def enter(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("hidden_states", None)
        return type(modules[start]).forward(modules[start], hidden_BTD, *args[1:], **kwargs)

    def give(*_: Any, **__: Any) -> Any:
        return (hidden_BTD,) if wraps else hidden_BTD

    skip.weightless = give.weightless = True  # type: ignore[attr-defined]  # no weight is lent for them
    try:
        for module in modules[:start]:
            module.forward = skip
        if start < len(modules):
            modules[start].forward = enter
        else:
            modules[-1].forward = give
        yield
    finally:
        for module in modules[: start + 1]:
            vars(module).pop("forward", None)


def where_called(model: nn.Module) -> torch.device:
    """The device a model computes on; weights that are not there just now are on none."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


@torch.no_grad()
def answers_with_tuple(model: nn.Module, module: nn.Module, ids_BT: Tensor) -> bool:
    """Whether decoder blocks of this model answer with a tuple or list, learnt from one call of the first."""
    found: list[bool] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(isinstance(output, (tuple, list)))
        raise Captured

    handle = module.register_forward_hook(note)
    try:
        with suppress(Captured):
            model(input_ids=ids_BT[:1, :2].to(where_called(model)), use_cache=False)
    finally:
        handle.remove()
    return found[0]


@contextmanager
def outputs_of(block: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the hidden states [B, T, D] a decoder block gives are noted."""
    found: list[Tensor] = []

    def note(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, (tuple, list)) else output)

    handle = block.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()
