"""Keys and values of past tokens in few bits: rounding through core.affine, dense packing, and stores that grow.

Letters: B batch, H key/value heads, T tokens, D head size, C = H * D channels, G groups. A row of codes keeps, per
group, a scale and its lowest value as 16-bit floats: x = low + scale * code. KIVI (Liu et al., arXiv 2402.02750) keeps
keys per channel over blocks of tokens and values per token, which is the default: keys have channels far larger than
the rest, and at 4 bits a scale per token loses all the others (docs/results/key-value-cache.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from polybit.core.precision import FLOAT
from polybit.nn.coding import code_rows, decode_rows, pack_rows, unpack_rows

GROUP = 64  # channels that share a scale
BLOCK = 32  # tokens that share a scale where keys are kept per channel
RECENT_BITS = 8  # tokens of a block of keys that is not full yet


def channels_last(x_BHTD: Tensor) -> Tensor:
    """[B, H, T, D] -> [B, T, C]."""
    return x_BHTD.transpose(1, 2).flatten(2)


def round_tokens(x_BHTD: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """Keys or values as a store per token would give them back, same shape and dtype; gradients pass straight."""
    if bits == FLOAT:
        return x_BHTD
    batch, heads, tokens, size = x_BHTD.shape
    rows_RC = channels_last(x_BHTD.detach()).reshape(batch * tokens, heads * size)
    rounded = decode_rows(*code_rows(rows_RC, bits, group), group)
    value = rounded.view(batch, tokens, heads, size).transpose(1, 2).to(x_BHTD.dtype)
    return x_BHTD + (value - x_BHTD).detach() if x_BHTD.requires_grad else value


def round_blocks(x_BHTD: Tensor, bits: int, block: int = BLOCK, group: int = GROUP) -> Tensor:
    """Keys as a store per channel would give them back when all are there; gradients pass straight.

    A scale then knows the later tokens of its own block: for training, and for attackers. To measure without that,
    read text through a packed cache block by block, as hub.lm.LocalLM does.
    """
    if bits == FLOAT:
        return x_BHTD
    full = x_BHTD.shape[2] // block * block
    store = ChannelStore(bits, block, group)
    parts = []
    if full:
        store.append(x_BHTD[:, :, :full].detach())
        parts.append(store.read(x_BHTD.dtype))
    if full < x_BHTD.shape[2]:
        parts.append(store.fresh(x_BHTD[:, :, full:].detach()))
    value = torch.cat([part for part in parts if part is not None], dim=2)
    return x_BHTD + (value - x_BHTD).detach() if x_BHTD.requires_grad else value


class PastStore(Protocol):
    """Past keys or values of one layer."""

    @property
    def length(self) -> int:
        """Tokens held."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...

    def append(self, x_BHTD: Tensor) -> None:
        """Take further tokens in."""
        ...

    def take(self, x_BHTD: Tensor) -> Tensor:
        """Take further tokens in; all tokens as attention sees them in the call that brings these."""
        ...

    def read(self, dtype: torch.dtype) -> Tensor | None:
        """All tokens [B, H, T, D], None while there is none."""
        ...

    def keep_first(self, tokens: int) -> None:
        """Forget all tokens after the first so many."""
        ...

    def drop_first(self, tokens: int) -> int:
        """Forget the first tokens, at most so many; how many were forgotten."""
        ...

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension (the first) to every tensor held."""
        ...


@dataclass(slots=True)
class FloatStore:
    """Tokens left in float."""

    held_BHTD: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens held."""
        return 0 if self.held_BHTD is None else self.held_BHTD.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return 0 if self.held_BHTD is None else self.held_BHTD.numel() * self.held_BHTD.element_size()

    def append(self, x_BHTD: Tensor) -> None:
        """Take further tokens in."""
        self.held_BHTD = x_BHTD if self.held_BHTD is None else torch.cat([self.held_BHTD, x_BHTD], dim=2)

    def take(self, x_BHTD: Tensor) -> Tensor:
        """Take further tokens in and give all."""
        self.append(x_BHTD)
        assert self.held_BHTD is not None
        return self.held_BHTD

    def read(self, dtype: torch.dtype) -> Tensor | None:
        """All tokens [B, H, T, D]."""
        return None if self.held_BHTD is None else self.held_BHTD.to(dtype)

    def keep_first(self, tokens: int) -> None:
        """Forget all tokens after the first so many."""
        if self.held_BHTD is not None:
            self.held_BHTD = self.held_BHTD[:, :, :tokens].clone()

    def drop_first(self, tokens: int) -> int:
        """Forget the first tokens."""
        if self.held_BHTD is not None and tokens:
            self.held_BHTD = self.held_BHTD[:, :, tokens:].clone()
        return tokens

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension."""
        if self.held_BHTD is not None:
            self.held_BHTD = change(self.held_BHTD)


@dataclass(frozen=True, slots=True)
class Coded:
    """Coded rows along a growing dimension T: bytes [B, T, N], scale and lowest value [B, T, G]."""

    bytes_BTN: Tensor
    scale_BTG: Tensor
    low_BTG: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three tensors."""
        return self.bytes_BTN, self.scale_BTG, self.low_BTG

    def each(self, change: Callable[[Tensor], Tensor]) -> Coded:
        """The same change on the three."""
        return Coded(*(change(tensor) for tensor in self.tensors()))

    def join(self, other: Coded | None) -> Coded:
        """These rows, then the other's."""
        if other is None:
            return self
        return Coded(*(torch.cat(pair, dim=1) for pair in zip(self.tensors(), other.tensors(), strict=True)))

    @property
    def nbytes(self) -> int:
        """Bytes of the three."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


def code(x_BTC: Tensor, bits: int, group: int) -> Coded:
    """Code rows of any two leading dimensions."""
    batch, tokens, columns = x_BTC.shape
    codes, scale, low = code_rows(x_BTC.reshape(batch * tokens, columns), bits, group)
    return Coded(*(part.view(batch, tokens, -1) for part in (pack_rows(codes, bits), scale, low)))


def decode(coded: Coded, bits: int, group: int, columns: int) -> Tensor:
    """The inverse of code, float32 [B, T, C]."""
    batch, tokens = coded.bytes_BTN.shape[:2]
    flat = coded.each(lambda tensor: tensor.flatten(0, 1))
    codes = unpack_rows(flat.bytes_BTN, bits, columns)
    return decode_rows(codes, flat.scale_BTG, flat.low_BTG, group).view(batch, tokens, columns)


@dataclass(slots=True)
class TokenStore:
    """Tokens coded one by one the moment they come."""

    bits: int
    group: int = GROUP
    held: Coded | None = None
    heads: int = 1
    columns: int = 0

    @property
    def length(self) -> int:
        """Tokens held."""
        return 0 if self.held is None else self.held.scale_BTG.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held, scales included."""
        return 0 if self.held is None else self.held.nbytes

    def append(self, x_BHTD: Tensor) -> None:
        """Take further tokens in."""
        self.heads, self.columns = x_BHTD.shape[1], x_BHTD.shape[1] * x_BHTD.shape[3]
        new = code(channels_last(x_BHTD), self.bits, self.group)
        self.held = new if self.held is None else self.held.join(new)

    def take(self, x_BHTD: Tensor) -> Tensor:
        """Take further tokens in and give all, the new ones as they will be read later."""
        self.append(x_BHTD)
        whole = self.read(x_BHTD.dtype)
        assert whole is not None
        return whole

    def read(self, dtype: torch.dtype) -> Tensor | None:
        """All tokens [B, H, T, D]."""
        if self.held is None:
            return None
        rows_BTC = decode(self.held, self.bits, self.group, self.columns)
        return rows_BTC.unflatten(2, (self.heads, -1)).transpose(1, 2).to(dtype)

    def keep_first(self, tokens: int) -> None:
        """Forget all tokens after the first so many."""
        if self.held is not None:
            self.held = self.held.each(lambda tensor: tensor[:, :tokens].clone())

    def drop_first(self, tokens: int) -> int:
        """Forget the first tokens."""
        if self.held is not None and tokens:
            self.held = self.held.each(lambda tensor: tensor[:, tokens:].clone())
        return tokens

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension."""
        if self.held is not None:
            self.held = self.held.each(change)


@dataclass(slots=True)
class ChannelStore:
    """Keys coded per channel over full blocks of `block` tokens; the unfinished block waits per token at 8 bits.

    KIVI §3.2. Unlike the paper, the waiting tokens are kept at 8 bits instead of in float, so that a short text saves
    memory too.
    """

    bits: int
    block: int = BLOCK
    group: int = GROUP  # of the waiting tokens
    blocks: Coded | None = None  # rows are channels: bytes [B, blocks * C, N]
    recent: TokenStore | None = None
    heads: int = 1
    columns: int = 0

    @property
    def full(self) -> int:
        """Tokens in full blocks."""
        return 0 if self.blocks is None else self.blocks.scale_BTG.shape[1] // self.columns * self.block

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.full + (0 if self.recent is None else self.recent.length)

    @property
    def nbytes(self) -> int:
        """Bytes held, scales and the waiting tokens included."""
        return sum(part.nbytes for part in (self.blocks, self.recent) if part is not None)

    def append(self, x_BHTD: Tensor) -> None:
        """Take further tokens in; every block that fills is coded per channel."""
        batch, self.heads, _, size = x_BHTD.shape
        self.columns = self.heads * size
        waiting = TokenStore(max(RECENT_BITS, self.bits), self.group) if self.recent is None else self.recent
        if waiting.length + x_BHTD.shape[2] < self.block:
            waiting.append(x_BHTD)
            self.recent = waiting
            return
        before = waiting.read(x_BHTD.dtype)
        whole_BTC = channels_last(x_BHTD if before is None else torch.cat([before, x_BHTD], dim=2))
        stop = whole_BTC.shape[1] // self.block * self.block
        rows = whole_BTC[:, :stop].unflatten(1, (-1, self.block)).transpose(2, 3)  # [B, block, C, token]
        new = code(rows.reshape(batch, -1, self.block), self.bits, self.block)
        self.blocks = new if self.blocks is None else self.blocks.join(new)
        self.recent = replace(waiting, held=None)
        if stop < whole_BTC.shape[1]:  # all of them came with this call
            self.recent.append(x_BHTD[:, :, stop - whole_BTC.shape[1] :])

    def take(self, x_BHTD: Tensor) -> Tensor:
        """Take further tokens in and give all, the new ones as waiting: a block's scale would know tokens to come."""
        if self.length - self.full + x_BHTD.shape[2] < self.block:
            self.append(x_BHTD)
            whole = self.read(x_BHTD.dtype)
            assert whole is not None
            return whole
        before = self.read(x_BHTD.dtype)
        self.append(x_BHTD)
        fresh = self.fresh(x_BHTD)
        return fresh if before is None else torch.cat([before, fresh], dim=2)

    def fresh(self, x_BHTD: Tensor) -> Tensor:
        """Tokens as they wait."""
        return round_tokens(x_BHTD, max(RECENT_BITS, self.bits), self.group)

    def read(self, dtype: torch.dtype) -> Tensor | None:
        """All tokens [B, H, T, D]."""
        parts = []
        if self.blocks is not None:
            rows = decode(self.blocks, self.bits, self.block, self.block)
            blocks = rows.unflatten(1, (-1, self.columns)).transpose(2, 3).flatten(1, 2)  # [B, T, C]
            parts.append(blocks.unflatten(2, (self.heads, -1)).transpose(1, 2).to(dtype))
        waiting = None if self.recent is None else self.recent.read(dtype)
        parts += [] if waiting is None else [waiting]
        return torch.cat(parts, dim=2) if parts else None

    def drop_first(self, tokens: int) -> int:
        """Forget the first tokens, in whole blocks."""
        gone = min(tokens, self.full) // self.block
        if self.blocks is not None and gone:
            self.blocks = self.blocks.each(lambda tensor: tensor[:, gone * self.columns :].clone())
        return gone * self.block

    def keep_first(self, tokens: int) -> None:
        """Forget all tokens after the first so many; a block that is cut open goes back to the waiting tokens."""
        stop = tokens
        if stop >= self.full:
            if self.recent is not None:
                self.recent.keep_first(stop - self.full)
            return
        assert self.blocks is not None
        whole = self.read(torch.float32)
        kept = stop // self.block
        blocks = self.blocks.each(lambda tensor: tensor[:, : kept * self.columns].clone())
        self.blocks, self.recent = (blocks if kept else None), None
        if whole is not None and stop > kept * self.block:
            self.append(whole[:, :, kept * self.block : stop])

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a change of the batch dimension."""
        if self.blocks is not None:
            self.blocks = self.blocks.each(change)
        if self.recent is not None:
            self.recent.change_rows(change)
