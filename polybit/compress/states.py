"""Hidden states on their way through a model: in memory as far as there is room, beyond it in a file without a name."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from polybit.core.runtime import PolybitError
from polybit.hub.pieces import raw


class Room:
    """Memory that the hidden states of one run may take together, and the folder for what does not fit.

    limit: bytes; None = as much as it takes
    folder: where the files lie; they have no name, so that a killed run leaves none behind
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self.limit, self.folder, self.taken = limit, folder, 0

    def take(self, size: int) -> bool:
        """Whether `size` bytes still fit; they are then taken."""
        if self.limit is not None and self.taken + size > self.limit:
            return False
        self.taken += size
        return True

    def give(self, size: int) -> None:
        """Give bytes back."""
        self.taken -= size

    def file(self) -> IO[bytes]:
        """A new file."""
        try:
            return tempfile.TemporaryFile(dir=self.folder, buffering=0)
        except OSError as error:
            raise PolybitError(f"hidden states cannot be written to {self.folder} ({error}): free some space") from None


class HiddenStates(Sequence[Tensor]):
    """A list of tensors of which only some are in memory; reading one gives the same bits as were put in.

    Read and written plainly, not mapped: mapped pages would count as memory of the run.
    """

    def __init__(self, room: Room) -> None:
        self.room = room
        self.kept: list[Tensor | None] = []
        self.spots: list[tuple[int, torch.Size, torch.dtype, torch.device]] = []
        self.opened: IO[bytes] | None = None
        self.end = 0

    def __len__(self) -> int:
        return len(self.kept)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        kept = self.kept[index]
        if kept is not None:
            return kept
        start, shape, dtype, device = self.spots[index]
        values = torch.empty(shape, dtype=dtype)
        assert self.opened is not None
        self.opened.seek(start)
        view = raw(values)
        while view:
            view = view[self.opened.readinto(view) :]  # type: ignore[attr-defined]
        return values.to(device)

    def append(self, value: Tensor) -> None:
        """Add one at the end."""
        self.kept.append(None)
        self.spots.append((-1, value.shape, value.dtype, value.device))
        self[len(self) - 1] = value

    def __setitem__(self, index: int, value: Tensor) -> None:
        if self.kept[index] is not None or self.room.take(value.nbytes):
            self.kept[index] = value
            return
        if self.opened is None:
            self.opened = self.room.file()
        start = self.spots[index][0]
        if start < 0:
            start, self.end = self.end, self.end + value.nbytes
        self.spots[index] = (start, value.shape, value.dtype, value.device)
        self.opened.seek(start)
        view = raw(value)
        try:
            while view:
                view = view[self.opened.write(view) :]
        except OSError as error:
            raise PolybitError(
                f"hidden states do not fit on the disk ({error}): free some space, or give more --memory"
            ) from None

    def clear(self) -> None:
        """Let all go."""
        self.room.give(sum(kept.nbytes for kept in self.kept if kept is not None))
        if self.opened is not None:
            self.opened.close()
        self.kept, self.spots, self.opened, self.end = [], [], None, 0


def let_go(states: Sequence[Sequence[Tensor]], needed: Sequence[Sequence[Tensor]]) -> None:
    """Clear those hidden states that nobody needs any more."""
    for each in states:
        if isinstance(each, HiddenStates) and not any(each is one for one in needed):
            each.clear()
