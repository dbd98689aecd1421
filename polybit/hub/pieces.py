"""Tensors of safetensors files, read and written in pieces: no more of them in memory than is being looked at."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polybit.core.runtime import PolybitError
from polybit.hub.files import Entry, double, read_entries

PIECE = 1 << 22  # bytes read at once
DTYPES = {  # spelling of safetensors, in the order in which it sorts a file's tensors, widest first
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ORDER = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}

Pieces = Callable[[str], Iterator[Tensor]]  # a tensor's name -> its values in order, cut anywhere, of its own dtype


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor lies: `start` is the byte of the file at which its values begin.

    Read with plain reads, not mapped: pages of a mapped file count as this process's memory until it is unmapped.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def __getitem__(self, _everything: Any) -> Tensor:
        """The whole tensor, asked for by `[...]` as transformers does."""
        return read_values(self.path, self.start, prod(self.shape), self.dtype).view(self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Some of the outermost rows."""
        width = prod(self.shape[1:])
        at = self.start + start * width * self.dtype.itemsize
        return read_values(self.path, at, (stop - start) * width, self.dtype).view(stop - start, *self.shape[1:])

    def pieces(self) -> Iterator[Tensor]:
        """All values in order, flat."""
        count, step = prod(self.shape), PIECE // self.dtype.itemsize
        for at in range(0, count, step):
            yield read_values(self.path, self.start + at * self.dtype.itemsize, min(step, count - at), self.dtype)


def read_values(path: Path, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """`count` values from byte `start` of a file, in memory of their own."""
    values = torch.empty(count, dtype=dtype)
    if not count:
        return values
    try:
        with path.open("rb", buffering=0) as handle:
            handle.seek(start)
            view = raw(values)
            while view:
                got = handle.readinto(view)
                if not got:
                    raise PolybitError(f"{path} ends before its tensors do: it is incomplete, fetch or make it again")
                view = view[got:]
    except OSError as error:
        raise PolybitError(
            f"{path} cannot be read any more ({error.strerror or error}): put it back or mend its disk, and run the "
            "same command again; nothing finished is lost"
        ) from error
    return values


def read_places(paths: Iterable[Path]) -> dict[str, Place] | None:
    """Where every tensor of some safetensors files lies; None when one is of a kind that is not read in pieces.

    Raises PolybitError for files that are damaged.
    """
    found: dict[str, tuple[Path, Entry]] = {}
    for path in paths:
        entries, _ = read_entries(path)
        twice = sorted(found.keys() & entries.keys())
        if twice:
            raise double(path, twice[0])
        found |= {name: (path, entry) for name, entry in entries.items()}
    if any(entry.dtype not in DTYPES for _, entry in found.values()):
        return None
    return {name: Place(path, DTYPES[e.dtype], e.shape, e.start) for name, (path, e) in found.items()}


def write_pieces(path: Path, shapes: Mapping[str, Tensor], pieces: Pieces, metadata: Mapping[str, str]) -> None:
    """A safetensors file, byte for byte as save_file writes it, from tensors that are never there as a whole.

    shapes: name -> any tensor of its shape and dtype; on the meta device it costs nothing
    """
    names = sorted(shapes, key=lambda name: (ORDER[shapes[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in names:
        tensor = shapes[name]
        stop = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            written = 0
            for piece in pieces(name):
                written += handle.write(raw(piece))
            wanted = header[name]["data_offsets"][1] - header[name]["data_offsets"][0]
            if written != wanted:
                raise PolybitError(f"{name!r:.120} came with {written} bytes instead of {wanted}: report this as a bug")
        handle.flush()
        os.fsync(handle.fileno())


def checked(pieces: Pieces, check: Callable[[Mapping[str, Tensor]], None]) -> Pieces:
    """The same pieces, each handed to `check` under its tensor's name on its way."""

    def through(name: str) -> Iterator[Tensor]:
        for piece in pieces(name):
            check({name: piece})
            yield piece

    return through


def raw(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy where it is contiguous."""
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def same_pieces(one: Iterator[Tensor], other: Iterator[Tensor]) -> bool:
    """Whether two tensors are the same to the last bit, however each is cut."""
    left, right = memoryview(b""), memoryview(b"")
    while True:
        left = left or next((raw(piece) for piece in one if piece.numel()), memoryview(b""))
        right = right or next((raw(piece) for piece in other if piece.numel()), memoryview(b""))
        size = min(len(left), len(right))
        if not size:
            return not left and not right
        if left[:size] != right[:size]:
            return False
        left, right = left[size:], right[size:]
