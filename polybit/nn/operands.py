"""The operands of one attention layer: widths of queries, keys and values, and what it sees in place of its cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from polybit.core.precision import FLOAT, Precision
from polybit.core.runtime import PolybitError
from polybit.nn.keyvalue import (
    BLOCK,
    GROUP,
    ChannelStore,
    FloatStore,
    PastStore,
    TokenStore,
    round_blocks,
    round_tokens,
)

CACHE_NAMES = ("past_key_values", "layer_past", "past_key_value")


@dataclass(slots=True)
class Operands:
    """The widths of one attention layer now, and how its keys are grouped.

    index: its place in a cache · keys: "channel" (KIVI) or "token" · group: channels that share a scale · block: tokens
    that share one where keys are per channel · module: the attention layer · query: where queries come from, or None.
    """

    name: str
    index: int
    module: nn.Module
    precision: Precision = field(default_factory=Precision)
    keys: str = "channel"
    group: int = GROUP
    block: int = BLOCK
    query: nn.Module | None = None

    def stores(self) -> tuple[PastStore, PastStore]:
        """Empty stores for keys and values at the widths of now."""
        k, v = self.precision.k, self.precision.v
        per_channel = self.keys == "channel"
        keys: PastStore = ChannelStore(k, self.block, self.group) if per_channel else TokenStore(k, self.group)
        return (keys if k != FLOAT else FloatStore()), (TokenStore(v, self.group) if v != FLOAT else FloatStore())


class Passage:
    """What an attention layer sees in place of its cache: rounds keys and values, then asks the cache, if any."""

    def __init__(self, operands: Operands, cache: Any) -> None:
        self.operands, self.cache = operands, cache

    def update(self, keys: Tensor, values: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, D] that attention reads."""
        port, precision = self.operands, self.operands.precision
        if port.keys == "token":
            keys = round_tokens(keys, precision.k, port.group)
        elif self.cache is None or precision.k == FLOAT or not self.cache.get_seq_length(port.index):
            keys = round_blocks(keys, precision.k, port.block, port.group)
        else:
            raise PolybitError(
                f"keys of {precision.k} bits per channel need the packed cache: call hub.cache.keep_packed(model), or "
                "arrange keys per token"
            )
        values = round_tokens(values, precision.v, port.group)
        return (keys, values) if self.cache is None else self.cache.update(keys, values, *rest, **named)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["cache"], name)
