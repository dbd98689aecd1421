"""What was read of one block as a file: its numbers and the codes they were read with, one .npz without pickle."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polybit.core.affine import QWeight
from polybit.core.runtime import PolybitError
from polybit.measure.sensitivity import BlockReading

BLOCKS = "block-*.npz"
CODES_BYTES = 1 << 30  # of codes that stay in memory once they were read


def packed(reading: BlockReading, codes: Mapping[str, Mapping[int, QWeight]], seconds: float) -> bytes:
    """A block's numbers and codes as one .npz file, without pickle."""
    widths = {name: sorted(row) for name, row in codes.items()}
    meta: dict[str, Any] = {
        "block": reading.block,
        "probes": list(reading.kl),
        "widths": widths,
        "work": reading.work,
        "naive": reading.naive,
        "seconds": seconds,
        "codes": {},
    }
    arrays: dict[str, Any] = {}
    for at, probe in enumerate(reading.kl):
        arrays[f"tokens.{at}"] = reading.tokens[probe]
        if probe in reading.float_nll:
            arrays[f"float.{at}"] = reading.float_nll[probe]
        for kind, table in (("kl", reading.kl), ("nll", reading.nll)):
            for name, row in table[probe].items():
                arrays[f"{kind}.{at}.{name}"] = np.stack([row[w] for w in widths[name]])
    for name, by_width in codes.items():
        for width, q in by_width.items():
            key = f"{name}@{width}"
            meta["codes"][key] = {"bits": q.bits, "group_size": q.group_size}
            arrays |= {f"u.{key}": q.codes_OI.numpy(), f"s.{key}": q.scale_OG.numpy(), f"z.{key}": q.zero.numpy()}
            if q.column_scale_I is not None:
                arrays[f"c.{key}"] = q.column_scale_I.numpy()
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8)
    buffer = BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def unpacked(path: Path) -> tuple[BlockReading, float]:
    """A block's numbers and its CPU seconds; the codes stay in the file for a `KeptCodes`."""
    with opened(path) as (file, meta):
        reading = BlockReading(meta["block"], work=meta["work"], naive=meta["naive"])
        for at, probe in enumerate(meta["probes"]):
            reading.tokens[probe] = file[f"tokens.{at}"]
            if f"float.{at}" in file:
                reading.float_nll[probe] = file[f"float.{at}"]
            for kind, table in (("kl", reading.kl), ("nll", reading.nll)):
                table[probe] = {
                    name: dict(zip(widths, file[f"{kind}.{at}.{name}"], strict=True))
                    for name, widths in meta["widths"].items()
                }
        return reading, float(meta["seconds"])


class KeptCodes(Mapping[str, "LayerCodes"]):
    """layer -> width -> its codes, read from the files of blocks when they are asked for.

    room: bytes of codes that stay in memory once they were read
    """

    def __init__(self, paths: Sequence[Path], room: int = CODES_BYTES) -> None:
        self.room = room
        self.layers: dict[str, LayerCodes] = {}
        for path in paths:
            with opened(path) as (_, meta):
                for name, widths in meta["widths"].items():
                    self.layers[name] = LayerCodes(self, path, name, widths)

    def __getitem__(self, name: str) -> LayerCodes:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


class LayerCodes(Mapping[int, QWeight]):
    """width -> codes of one layer."""

    def __init__(self, owner: KeptCodes, path: Path, name: str, widths: Sequence[int]) -> None:
        self.owner, self.path, self.name, self.widths = owner, path, name, tuple(widths)
        self.kept: dict[int, QWeight] = {}

    def __getitem__(self, width: int) -> QWeight:
        if width in self.kept:
            return self.kept[width]
        if width not in self.widths:
            raise KeyError(width)
        with opened(self.path) as (file, meta):
            key = f"{self.name}@{width}"
            fields = meta["codes"][key]
            part = {leaf: torch.from_numpy(file[f"{leaf}.{key}"]) for leaf in "uszc" if f"{leaf}.{key}" in file}
            q = QWeight(part["u"], part["s"], part["z"], fields["bits"], fields["group_size"], {}, part.get("c"))
        size = sum(tensor.nbytes for tensor in part.values())
        if size <= self.owner.room:
            self.owner.room -= size
            self.kept[width] = q
        return q

    def __iter__(self) -> Iterator[int]:
        return iter(self.widths)

    def __len__(self) -> int:
        return len(self.widths)


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """A block's file and what it says of itself; anything wrong with it is one sentence."""
    try:
        with np.load(path, allow_pickle=False) as file:
            yield file, json.loads(bytes(file["meta"]))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise PolybitError(
            f"{path} of an earlier run cannot be read ({error!s:.100}): measure again with --restart"
        ) from error


def kept_codes(folder: Path) -> KeptCodes:
    """The codes of all measured blocks in a folder."""
    return KeptCodes(sorted(folder.glob(BLOCKS)))
