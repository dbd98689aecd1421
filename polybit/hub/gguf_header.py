"""The head of a GGUF file, checked before anybody trusts it: counts, lengths, names, and where each tensor lies.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: magic, version, counts, keys with
values, tensors with shape, type and offset, padding, data. As llama.cpp does, tensors must follow each other without
gaps. Readers in Python walk arrays value by value, also past the end of the file, and build what sizes say; so a length
that the file cannot hold and a size that no tensor has are refused here.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from polybit.core.runtime import PolybitError

MAGIC = b"GGUF"
SCALARS = dict(enumerate("BbHhIif?", 0)) | {10: "Q", 11: "q", 12: "d"}  # number of a type -> struct's letter
STRING, ARRAY = 8, 9
MOST_VALUES = 1 << 22  # of all arrays together; the largest vocabulary with its merges has under 2 million
MOST_DIMENSIONS = 4
ALIGNMENT = 32
SIZES = re.compile(  # sizes that some tensor of the model has as a side
    r"\w+\.(embedding_length|feed_forward_length|expert_feed_forward_length|vocab_size|expert_count|expert_used_count|"
    r"attention\.(head_count|head_count_kv|key_length|value_length))"
)
BLOCKS, BLOCK = re.compile(r"\w+\.block_count"), re.compile(r"(?:^|\.)blk\.(\d{1,6})\.")


class GgufDamage(Exception):
    """What is wrong with a file, as the middle of a sentence."""


def check_gguf(path: Path) -> None:
    """Raises PolybitError in one sentence for a file whose head is damaged, or whose data does not fit it."""
    size = path.stat().st_size
    try:
        if size < 24:
            raise GgufDamage("it ends before its head does")
        with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            GgufHead(data, size).check()
    except (GgufDamage, struct.error, UnicodeDecodeError) as error:
        said = "it names something in no UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise PolybitError(f"{path} ({size} bytes) is no whole GGUF file ({said:.160}): fetch it again") from None


@dataclass
class GgufHead:
    """A place in the bytes of a file, moving forward."""

    data: Any
    size: int
    at: int = len(MAGIC)
    order: str = "<"
    values: int = 0
    keys: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        if self.data[: self.at] != MAGIC:
            raise GgufDamage("it does not begin as a GGUF file does")
        version = self.number("I")
        if version & 0xFFFF == 0:  # written on a machine of the other byte order
            self.order, self.at = ">", len(MAGIC)
            version = self.number("I")
        if version not in (2, 3):
            raise GgufDamage(f"its version is {version}, and 2 and 3 are known")
        tensors, keys = self.number("Q"), self.number("Q")
        self.room(13 * keys + 24 * tensors, "its counts")
        for _ in range(keys):
            name = self.text()
            if name in self.keys:
                raise GgufDamage(f"the key {name!r:.80} stands there twice")
            self.keys[name] = self.value(self.number("I"), name)
        if self.keys.get("split.count", 1) not in (0, 1):
            raise GgufDamage(f"it is one of {self.keys['split.count']} parts, to be joined by llama-gguf-split --merge")
        self.check_tensors([self.tensor() for _ in range(tensors)])

    def room(self, count: int, what: str) -> None:
        """Refuse what the file is too short for."""
        if count > self.size - self.at:
            raise GgufDamage(f"{what!s:.80} would take {count} bytes, and {self.size - self.at} are left")

    def number(self, letter: str) -> Any:
        layout = self.order + letter
        found = struct.unpack_from(layout, self.data, self.at)[0]
        self.at += struct.calcsize(layout)
        return found

    def text(self) -> str:
        length = self.number("Q")
        self.room(length, "a name or text")
        self.at += length
        return bytes(self.data[self.at - length : self.at]).decode()

    def value(self, kind: int, name: str) -> Any:
        """The value of a key; of an array only where it holds sizes."""
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise GgufDamage(f"the key {name!r:.80} has a value of type {kind}, which there is not")
        inner, length = self.number("I"), self.number("Q")
        self.values += length
        if self.values > MOST_VALUES:
            raise GgufDamage(f"its arrays have {self.values} values and more, and {MOST_VALUES} are allowed")
        if inner == STRING:
            self.room(8 * length, f"the array {name!r}")
            for _ in range(length):
                self.text()
            return None
        if inner not in SCALARS:
            raise GgufDamage(f"the array {name!r:.80} has values of type {inner}, which is read nowhere")
        layout = f"{self.order}{length}{SCALARS[inner]}"
        self.room(struct.calcsize(layout), f"the array {name!r}")
        start, self.at = self.at, self.at + struct.calcsize(layout)
        return list(struct.unpack_from(layout, self.data, start)) if SIZES.fullmatch(name) else None

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, type, offset)."""
        name, dimensions = self.text(), self.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise GgufDamage(
                f"the tensor {name!r:.80} has {dimensions} dimensions, and 1 to {MOST_DIMENSIONS} are allowed"
            )
        shape = tuple(self.number("Q") for _ in range(dimensions))
        return name, shape, self.number("I"), self.number("Q")

    def check_tensors(self, tensors: list[tuple[str, tuple[int, ...], int, int]]) -> None:
        """Each tensor once, of a known type, after the one before, inside the file; sizes are those of tensors."""
        from gguf.constants import GGML_QUANT_SIZES

        alignment = self.keys.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise GgufDamage(f"its alignment is {alignment!r:.40}, and a power of two is needed")
        self.at += -self.at % alignment
        expected, seen = 0, set[str]()
        sizes = {int(kind): of for kind, of in GGML_QUANT_SIZES.items()}
        for name, shape, kind, offset in tensors:
            if name in seen:
                raise GgufDamage(f"the tensor {name!r:.80} stands there twice")
            seen.add(name)
            if kind not in sizes:
                raise GgufDamage(f"the tensor {name!r:.80} is of type {kind}, which the package gguf does not know")
            block, width = sizes[kind]
            if min(shape) < 1 or shape[0] % block or prod(shape) > 1 << 48:
                raise GgufDamage(
                    f"the tensor {name!r:.80} has the shape {shape}, and rows are of {block} values or more"
                )
            if offset != expected:
                raise GgufDamage(
                    f"the tensor {name!r:.80} begins at {offset} and not at {expected}, where the one before ends"
                )
            self.room(offset + (length := prod(shape) // block * width), f"the tensor {name!r}")
            expected = offset + length + -length % alignment
        if self.size - self.at - expected >= alignment:
            raise GgufDamage(f"it goes on for {self.size - self.at - expected} bytes after its last tensor")
        self.check_sizes(tensors)

    def check_sizes(self, tensors: list[tuple[str, tuple[int, ...], int, int]]) -> None:
        """Sizes are those of tensors, and there are as many blocks: readers build what they are told."""
        longest = max((max(shape) for _, shape, _, _ in tensors), default=0)
        blocks = len({found[1] for name, *_ in tensors if (found := BLOCK.search(name))})
        for name, value in self.keys.items():
            if BLOCKS.fullmatch(name) and value != blocks:
                raise GgufDamage(f"{name!r:.80} is {value!r:.40}, and tensors are there of {blocks} blocks")
            for size in value if isinstance(value, list) else [value]:
                if SIZES.fullmatch(name) and (not isinstance(size, int) or not 0 <= size <= longest):
                    raise GgufDamage(f"{name!r:.80} is {size!r:.40}, and no tensor has a side longer than {longest}")
