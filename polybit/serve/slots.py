"""Places in the cache of keys and values, and what of a finished answer is still in them for the next request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

LEAST = 8  # tokens a common beginning must have to be worth a place of its own


@dataclass(slots=True)
class Slot:
    """One place. The first `filled` of `tokens` are in it, read at `key` (Decoding.cache_key) · busy: whether an answer
    uses it."""

    index: int
    tokens: list[int] = field(default_factory=list)
    filled: int = 0
    key: object = None
    busy: bool = False
    used: int = 0  # when it was last taken, for choosing the place to give up


@dataclass(frozen=True, slots=True)
class Taken:
    """A place for an answer: `common` tokens are in it already; `copy_from` another place to take them from first."""

    slot: Slot
    common: int
    copy_from: int | None = None


class Slots:
    """All places; a beginning is shared only between requests that read it alike."""

    def __init__(self, count: int) -> None:
        self.slots = [Slot(index) for index in range(count)]
        self.clock = 0

    @property
    def free(self) -> int:
        """Places no answer uses."""
        return sum(not slot.busy for slot in self.slots)

    def take(self, tokens: Sequence[int], key: object, *, copies: bool, step: int = 1) -> Taken | None:
        """The place where most of the prompt is read already, else the one unused for longest; None when all are busy.

        copies: whether one place can be copied into another · step: common beginnings are cut to a multiple of it. The
        last token of a prompt is always read again: its logits are needed.
        """
        idle = [slot for slot in self.slots if not slot.busy]
        if not idle:
            return None
        most = len(tokens) - 1
        found = {slot.index: self.common(slot, tokens, key, most, step) for slot in self.slots}
        best = max(idle, key=lambda slot: (found[slot.index], -slot.used))
        if found[best.index] < LEAST:
            best = min(idle, key=lambda slot: (slot.filled > 0, slot.used))
        source = max(self.slots, key=lambda slot: found[slot.index])
        common, copy_from = found[best.index], None
        if copies and found[source.index] >= max(LEAST, common + LEAST):
            common, copy_from = found[source.index], source.index
        self.clock += 1
        best.busy, best.used, best.key, best.tokens, best.filled = True, self.clock, key, list(tokens), common
        return Taken(best, common, copy_from)

    def common(self, slot: Slot, tokens: Sequence[int], key: object, most: int, step: int) -> int:
        """Length of the beginning that a place and a prompt share."""
        if slot.key != key:
            return 0
        count = 0
        for ours, theirs in zip(slot.tokens[: min(most, slot.filled)], tokens, strict=False):
            if ours != theirs:
                break
            count += 1
        return count - count % step

    def release(self, slot: Slot) -> None:
        """Give a place back; what is in it stays for a later request."""
        slot.busy = False

    def forget(self, slot: Slot) -> None:
        """What is in the place is not to be trusted."""
        slot.tokens, slot.filled, slot.key = [], 0, None
