"""A transformers cache that holds packed bytes: keys and values at the widths the model's precision gives them.

`keep_packed(model)` makes every later `generate` and cached forward pass use it; loading a checkpoint does so already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from polybit.core.precision import FLOAT
from polybit.core.runtime import PolybitError
from polybit.nn.attention import ports
from polybit.nn.board import board_of
from polybit.nn.operands import Operands


class PackedLayer(DynamicLayer):
    """Keys and values of one attention layer as packed codes; with a sliding window only its tokens are kept."""

    def __init__(self, operands: Operands, sliding_window: int | None = None) -> None:
        super().__init__()
        self.key_store, self.value_store = operands.stores()
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.seen = 0
        self.padding: Tensor | None = None  # tokens of padding before each row, where it was told

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens held, scales included."""
        return self.key_store.nbytes + self.value_store.nbytes

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new tokens in; gives all keys and values [B, H, T, D] that attention may read."""
        self.is_initialized, self.dtype, self.device = True, key_states.dtype, key_states.device
        if not self.seen and self.padding is not None:
            key_states = without_padding(key_states, self.padding)
        found = self.key_store.take(key_states), self.value_store.take(value_states)
        self.seen += key_states.shape[2]
        if self.sliding_window is not None and self.key_store.length >= self.sliding_window:
            # keys per channel go by whole blocks: tokens before the window that stay are masked by their position
            gone = self.key_store.drop_first(self.key_store.length - self.sliding_window + 1)
            self.value_store.drop_first(gone)
        return found

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        """The sliding window, or -1."""
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the keys attention will read, and the position of the first."""
        return self.key_store.length + query_length, self.seen - self.key_store.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens (a negative number, as transformers counts)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a negative number of tokens, got {tokens_to_remove}")
        if not tokens_to_remove or not self.seen:
            return
        if self.seen != self.key_store.length:
            raise PolybitError(
                f"a packed cache cannot forget {-tokens_to_remove} tokens after its sliding window of "
                f"{self.sliding_window} was passed: use k16v16 for assisted decoding with this model"
            )
        self.seen = max(0, self.seen + tokens_to_remove)
        for store in (self.key_store, self.value_store):
            store.keep_first(self.seen)

    def activate_past_recording(self) -> None:
        """Needed only beyond a sliding window, where crop refuses."""

    def reset(self) -> None:
        """Forget everything."""
        self.crop(-self.seen) if self.seen == self.key_store.length else self.forget()

    def forget(self) -> None:
        """Drop all tokens."""
        self.seen = 0
        for store in (self.key_store, self.value_store):
            store.keep_first(0)

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension."""
        for store in (self.key_store, self.value_store):
            store.change_rows(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i becomes row beam_idx[i]."""
        self.change_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row several times."""
        self.change_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some rows stay."""
        self.change_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def offload(self) -> None:
        """Packed codes stay where they are."""

    def prefetch(self) -> None:
        """Packed codes stay where they are."""


def without_padding(x_BHTD: Tensor, padding_B: Tensor) -> Tensor:
    """Keys with those of padding on the left, which nothing reads, replaced by the first real ones: a channel's scale
    then fits what is read."""
    if not bool(padding_B.any()):
        return x_BHTD
    place_BT = torch.arange(x_BHTD.shape[2], device=x_BHTD.device).expand(len(x_BHTD), -1)
    index = torch.maximum(place_BT, padding_B.to(x_BHTD.device)[:, None].clamp_max(x_BHTD.shape[2] - 1))
    return x_BHTD.gather(2, index[:, None, :, None].expand_as(x_BHTD))


class PackedCache(Cache):
    """A cache whose attention layers hold packed codes; layers of other kinds (linear attention) are transformers'."""

    packs = True  # nn/attention.py leaves the rounding to it

    def __init__(self, model: nn.Module, mask_BT: Tensor | None = None) -> None:
        """mask_BT: the attention mask of the prompts, where some are padded on the left."""
        places = {operands.index: operands for operands in ports(model).values()}
        plain = DynamicCache(config=model.config)  # type: ignore[arg-type]
        count = max([len(plain.layers), *(index + 1 for index in places)])
        layers = [
            packed(plain.layers[n] if n < len(plain.layers) else DynamicLayer(), places.get(n)) for n in range(count)
        ]
        super().__init__(layers=layers)
        if mask_BT is not None and mask_BT.ndim == 2:
            for layer in layers:
                layer.padding = mask_BT.long().argmax(-1)

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(cache_bytes(layer) for layer in self.layers)


def packed(layer: Any, operands: Operands | None) -> Any:
    """The packed layer that takes the place of one of transformers'."""
    if operands is None or type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return layer
    return PackedLayer(operands, getattr(layer, "sliding_window", None))


def cache_bytes(held: Any) -> int:
    """Bytes that a cache, or one layer of a cache, holds now; counts packed and plain tensors alike."""
    if hasattr(held, "layers"):
        return sum(cache_bytes(layer) for layer in held.layers)
    if isinstance(held, PackedLayer):
        return held.nbytes
    tensors = [getattr(held, name, None) for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def keep_packed(model: nn.Module) -> nn.Module:
    """Let `generate` and cached forward passes hold keys and values packed whenever the precision gives k or v a width.

    A cache that was filled already, and one of another kind (static, offloaded), is left as it is: its numbers are then
    rounded alike, its bytes are not packed. Returns the model.
    """
    board = board_of(model)
    if not board.keeps_packed:
        board.keeps_packed = True
        model.register_forward_pre_hook(give_cache, with_kwargs=True)
    return model


def give_cache(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Before a forward pass: an empty cache becomes a packed one where keys or values have a width."""
    known = board_of(model).operands or {}
    if all(operands.precision.k == FLOAT and operands.precision.v == FLOAT for operands in known.values()):
        return None
    cache = kwargs.get("past_key_values")
    wanted = kwargs.get("use_cache", getattr(model.config, "use_cache", False)) and not model.training
    absent = cache is None and wanted
    empty = type(cache) is DynamicCache and not cache.get_seq_length() and not cache.offloading
    if not (absent or empty):
        return None
    made = PackedCache(model, kwargs.get("attention_mask"))
    if cache is None:
        return args, {**kwargs, "past_key_values": made}
    # whoever made the empty cache may hold on to it, so it is the same object that becomes a packed one
    cache.layers, cache.layer_class_to_replicate, cache.packs = made.layers, None, True
    return None


def reads_in_blocks(model: nn.Module) -> int:
    """Tokens at a time in which text must be read for keys per channel to know no later token; 0 = all at once."""
    known = board_of(model).operands or {}
    blocks = {o.block for o in known.values() if o.keys == "channel" and o.precision.k != FLOAT}
    return min(blocks, default=0)


def logits_in_blocks(model: nn.Module, ids_BT: Tensor, block: int) -> Tensor:
    """logits_BTV of whole windows read block by block through a packed cache, as decoding token by token would."""
    cache = PackedCache(model)
    parts = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids_BT.split(block, dim=1)]
    return torch.cat(parts, dim=1)
