"""What computes: rows of tokens of many sequences at many precisions, by the compiled decoder, by transformers, or each
precision by the one that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polybit.core.runtime import PolybitError
from polybit.hub.cache import keep_packed
from polybit.hub.rows import RowDecoder, TokenRows
from polybit.hub.rows import supported as has_rows
from polybit.nn.switch import use


class Runner(Protocol):
    """The engine's only view of a model. Numbers of a sequence do not depend on what else is read with it."""

    slots: int
    room: int

    def exact(self, precision: str) -> bool:
        """Whether they do not depend on how tokens are cut into parts either, bit for bit. Precisions of which only one
        is exact cannot read the same sequence."""
        ...

    def setting(self, precision: str, *, draft: bool = False) -> int:
        """The number of a precision; PolybitError for one the model cannot be read at.

        draft: only to propose tokens, so that the head may be read at fewer bits and for the likeliest tokens alone.
        """
        ...

    def read(self, parts: Sequence[TokenRows], keep: Sequence[int]) -> list[Tensor]:
        """Read all parts; the logits [n, V] of the last `keep[i]` tokens of part i, float32."""
        ...

    def copy(self, source: int, target: int, length: int) -> bool:
        """Give one slot the first `length` tokens of another; False where that is not possible."""
        ...


class RowRunner:
    """Many sequences and precisions in one step (hub/rows.py)."""

    def __init__(self, model: nn.Module, *, slots: int, room: int) -> None:
        self.slots, self.room = slots, room
        self.decoder = RowDecoder(model, slots=slots, room=room)

    def exact(self, precision: str) -> bool:
        """See Runner."""
        return True

    def setting(self, precision: str, *, draft: bool = False) -> int:
        """See Runner."""
        return self.decoder.setting(precision, draft=draft)

    def read(self, parts: Sequence[TokenRows], keep: Sequence[int]) -> list[Tensor]:
        """See Runner; parts of one setting are put side by side, so that they meet each weight together."""
        if not parts:
            return []
        order = sorted(range(len(parts)), key=lambda i: (parts[i].setting, i))
        hidden_RD = self.decoder.step([parts[i] for i in order])
        wanted: dict[int, list[tuple[int, Tensor]]] = {}
        end = 0
        for i in order:
            end += len(parts[i].tokens)
            if keep[i]:
                wanted.setdefault(parts[i].setting, []).append((i, hidden_RD[end - keep[i] : end]))
        found = [torch.empty(0)] * len(parts)
        for setting, rows in wanted.items():
            logits_RV = self.decoder.logits(torch.cat([hidden for _, hidden in rows]), setting)
            for (i, _), part in zip(rows, logits_RV.split([len(hidden) for _, hidden in rows]), strict=True):
                found[i] = part
        return found

    def copy(self, source: int, target: int, length: int) -> bool:
        """See Runner."""
        self.decoder.copy(source, target, length)
        return True


class PlainRunner:
    """Any model on any device by its own forward pass, one sequence after the other: each has a cache of its own."""

    def __init__(self, model: nn.Module, *, slots: int, room: int, quantized: bool = True) -> None:
        self.model, self.slots, self.room, self.quantized = keep_packed(model), slots, room, quantized
        self.names: list[str] = []
        self.caches: list[Any] = [None] * slots
        self.now: int | None = None

    def exact(self, precision: str) -> bool:
        """See Runner."""
        return False

    def setting(self, precision: str, *, draft: bool = False) -> int:
        """See Runner."""
        if precision not in self.names:
            if self.quantized:
                use(self.model, precision)
                self.now = len(self.names)
            self.names.append(precision)
        return self.names.index(precision)

    @torch.inference_mode()
    def read(self, parts: Sequence[TokenRows], keep: Sequence[int]) -> list[Tensor]:
        """See Runner."""
        found = [torch.empty(0)] * len(parts)
        for i in sorted(range(len(parts)), key=lambda i: (parts[i].setting, i)):
            found[i] = self.read_one(parts[i])[len(parts[i].tokens) - keep[i] :]
        return found

    def read_one(self, part: TokenRows) -> Tensor:
        """Logits [T, V] of one part, float32."""
        if self.quantized and self.now != part.setting:
            use(self.model, self.names[part.setting])
            self.now = part.setting
        cache = self.caches[part.slot] if part.start else None
        if cache is not None and cache.get_seq_length() > part.start:
            cache.crop(part.start - cache.get_seq_length())
        device = next(self.model.parameters()).device
        ids_1T = torch.tensor([part.tokens], device=device)
        out = self.model(input_ids=ids_1T, past_key_values=cache, use_cache=True)
        self.caches[part.slot] = out.past_key_values
        return out.logits[0].float().cpu()

    def copy(self, source: int, target: int, length: int) -> bool:
        """See Runner: caches are not shared here."""
        return False


class BothRunner:
    """Compiled rows for the precisions they read; the model's own forward pass for those that round activations,
    queries, keys or values."""

    def __init__(self, model: nn.Module, *, slots: int, room: int) -> None:
        self.slots, self.room = slots, room
        self.rows = RowRunner(model, slots=slots, room=room)
        self.plain = PlainRunner(model, slots=slots, room=room)
        self.others: dict[str, int] = {}  # precisions that rows do not read, with their numbers there

    def exact(self, precision: str) -> bool:
        """See Runner."""
        return self.setting(precision) >= 0

    def setting(self, precision: str, *, draft: bool = False) -> int:
        """See Runner; below zero for those that rows do not read."""
        if precision not in self.others:
            try:
                return self.rows.setting(precision, draft=draft)
            except PolybitError:
                self.others[precision] = self.plain.setting(precision)
        return -1 - self.others[precision]

    def read(self, parts: Sequence[TokenRows], keep: Sequence[int]) -> list[Tensor]:
        """See Runner."""
        if all(part.setting >= 0 for part in parts):
            return self.rows.read(parts, keep)
        found = [torch.empty(0)] * len(parts)
        for wanted, runner in ((True, self.rows), (False, self.plain)):
            chosen = [i for i, part in enumerate(parts) if (part.setting >= 0) is wanted]
            given = [parts[i] if wanted else replace(parts[i], setting=-1 - parts[i].setting) for i in chosen]
            for i, logits_nV in zip(chosen, runner.read(given, [keep[i] for i in chosen]), strict=True):
                found[i] = logits_nV
        return found

    def copy(self, source: int, target: int, length: int) -> bool:
        """See Runner: asked for exact precisions only."""
        return self.rows.copy(source, target, length)


def make_runner(model: nn.Module, *, slots: int, room: int, quantized: bool) -> Runner:
    """The compiled decoder where it reads this model and precision, else the model's own forward pass."""
    if quantized and has_rows(model):
        return BothRunner(model, slots=slots, room=room)
    return PlainRunner(model, slots=slots, room=room, quantized=quantized)
