"""What was read of one block as a file: its numbers and the codes they were read with, one .npz without pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polybit.core.affine import QWeight
from polybit.core.runtime import PolybitError
from polybit.measure.sensitivity import BlockReading

BLOCKS = "block-*.npz"


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


def unpacked(path: Path) -> tuple[BlockReading, dict[str, dict[int, QWeight]], float]:
    """The inverse of `packed`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(bytes(file["meta"]))
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
            codes: dict[str, dict[int, QWeight]] = {}
            for key, fields in meta["codes"].items():
                name, _, width = key.rpartition("@")
                part = {leaf: torch.from_numpy(file[f"{leaf}.{key}"]) for leaf in "uszc" if f"{leaf}.{key}" in file}
                codes.setdefault(name, {})[int(width)] = QWeight(
                    part["u"], part["s"], part["z"], fields["bits"], fields["group_size"], {}, part.get("c")
                )
            return reading, codes, float(meta["seconds"])
    except (OSError, ValueError, KeyError) as error:
        raise PolybitError(
            f"{path} of an earlier run cannot be read ({error!s:.100}): measure again with --restart"
        ) from (error)


def kept_codes(folder: Path) -> dict[str, dict[int, QWeight]]:
    """The codes of all measured blocks in a folder: layer -> width -> codes."""
    return {name: row for path in sorted(folder.glob(BLOCKS)) for name, row in unpacked(path)[1].items()}
