"""Named tensors in one safetensors file that is there whole or not at all: caches and states of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from polybit.core.runtime import PolybitError, atomic_path
from polybit.hub.directory import disk_errors
from polybit.hub.pieces import write_pieces


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, notes: Mapping[str, str] | None = None) -> None:
    """Write tensors and a few remarks, atomically; the same ones are the same bytes, which save_file's are not."""
    with disk_errors(path), atomic_path(path) as staged:
        write_pieces(staged, tensors, lambda name: iter([tensors[name]]), {"format": "pt", **(notes or {})})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, remarks) of `write_tensors`; the tensors are mapped from the file, so that little is read at once."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise PolybitError(f"{path} cannot be read ({error!s:.100}): remove it and run the command again") from error
