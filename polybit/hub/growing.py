"""Room for tokens to come in a transformers cache, so that a step does not copy all that came before it.

    cache = with_room(model(ids, use_cache=True).past_key_values)

transformers joins a token to its keys and values by copying all of them, which takes half of the time of a batch of
long texts. What attention reads is the same, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

GROWTH = 1.5  # times what is held, when room runs out
LEAST = 64  # tokens of room beyond what is held


class RoomyStates:
    """A tensor [B, H, T, D] with room at the end of T, and how many tokens anybody has written into it.

    Whoever holds fewer tokens than that is a branch of its own (a copied or cropped cache) and gets a tensor of its
    own, so that nobody writes over what another reads.
    """

    def __init__(self, states_BHTD: Tensor, more: int) -> None:
        batch, heads, length, size = states_BHTD.shape
        room = max(int(GROWTH * length), length + LEAST, length + more)
        self.buffer_BHTD = states_BHTD.new_empty(batch, heads, room, size)
        self.buffer_BHTD[:, :, :length] = states_BHTD
        self.filled = length

    def has_room(self, states_BHTD: Tensor, more: int) -> bool:
        """Whether `more` tokens can be written behind `states_BHTD` in place."""
        ours = self.buffer_BHTD
        return (
            states_BHTD.data_ptr() == ours.data_ptr()
            and states_BHTD.shape[:2] == ours.shape[:2]
            and states_BHTD.shape[2] == self.filled <= ours.shape[2] - more
            and ours.is_inference() <= torch.is_inference_mode_enabled()
        )

    def append(self, new_BHTD: Tensor) -> Tensor:
        """All tokens with the new ones, a view."""
        end = self.filled + new_BHTD.shape[2]
        self.buffer_BHTD[:, :, self.filled : end] = new_BHTD
        self.filled = end
        return self.buffer_BHTD[:, :, :end]


class RoomyLayer(DynamicLayer):
    """Keys and values of one attention layer in tensors with room; all else is a DynamicLayer's."""

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.__dict__.update(layer.__dict__)
        self.held: dict[str, RoomyStates] = {}

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens in; gives all keys and values [B, H, T, D]."""
        learns = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if learns or self.keys is None or self.values is None or not self.get_seq_length():
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys = self._appended("keys", self.keys, key_states)
        self.values = self._appended("values", self.values, value_states)
        return self.keys, self.values

    def _appended(self, name: str, states_BHTD: Tensor, new_BHTD: Tensor) -> Tensor:
        more = new_BHTD.shape[2]
        if name not in self.held or not self.held[name].has_room(states_BHTD, more):
            self.held[name] = RoomyStates(states_BHTD, more)
        return self.held[name].append(new_BHTD)


def with_room(cache: Any) -> Any:
    """The same cache, its plain layers with room from now on; layers of other kinds, and other caches, as they are."""
    if type(cache) is DynamicCache:
        cache.layers = [RoomyLayer(layer) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
