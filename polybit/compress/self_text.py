"""Calibration text the model writes itself, where the user has none at hand (LLM-QAT, arXiv 2305.17888 §2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polybit.core.runtime import PolybitError, track
from polybit.hub.growing import with_room

GREEDY_TOKENS = 4  # without a start token, this many greedy tokens follow a random first one, then sampling begins


@torch.inference_mode()
def self_text(
    model: nn.Module,
    start: int | None,
    *,
    count: int,
    length: int,
    seed: int,
    batch: int = 32,
    kind: str = "calibration",
) -> Tensor:
    """Windows of token ids [count, length] drawn from the model's own distribution at temperature 1.

    start: id of the token every window begins with; None = random vocabulary tokens, each followed by a few greedy
    ones, so that a rare first token does not lead straight into noise. An end token does not stop a window: the next
    text simply begins, as in a packed calibration set. kind: of text, to tell progress.
    """
    draw = torch.Generator().manual_seed(seed)
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    windows = [torch.empty(0, length, dtype=torch.long)]
    for first in track(range(0, count, batch), f"writing {kind} text"):
        size = min(batch, count - first)
        drawn = torch.randint(0, vocabulary, (size, 1), generator=draw)
        ids = drawn if start is None else torch.full_like(drawn, start)
        windows.append(continue_text(model, ids, length, draw, greedy=0 if start is not None else GREEDY_TOKENS))
    return torch.cat(windows)


def continue_text(model: nn.Module, ids_BT: Tensor, length: int, draw: torch.Generator, *, greedy: int) -> Tensor:
    """Extend every row to `length` tokens, with a key-value cache where the model has one."""
    cache, fed = None, ids_BT
    device = next(model.parameters()).device
    while ids_BT.shape[1] < length:
        try:
            output = model(input_ids=fed.to(device), past_key_values=cache, use_cache=True)
        except PolybitError:
            raise
        except Exception as error:  # whatever a model raises: it cannot write, and the remedy is the same
            raise PolybitError(
                f"{type(model).__name__} could not write a text of its own ({type(error).__name__}: {error!s:.120}): "
                "give a text to calibrate on"
            ) from error
        cache = with_room(getattr(output, "past_key_values", None))
        logits_BV = output.logits[:, -1].float().cpu()
        if ids_BT.shape[1] <= greedy:
            fed = logits_BV.argmax(-1, keepdim=True)
        else:
            fed = torch.multinomial(logits_BV.softmax(-1), 1, generator=draw)
        ids_BT = torch.cat([ids_BT, fed], dim=1)
        fed = ids_BT if cache is None else fed
    return ids_BT
