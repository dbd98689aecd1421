"""What a quantization run has finished so far, kept beside its output so that a killed run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import polybit
from polybit.core.affine import QWeight
from polybit.core.planes import Planes, pack, unpack
from polybit.core.runtime import PolybitError, warn, write_json
from polybit.hub.directory import absolute, disk_errors, output_lock
from polybit.hub.files import read_entries, read_json
from polybit.hub.pieces import Place, read_places
from polybit.hub.tensors import write_tensors
from polybit.nn.fields import Fields, tensors_of

FINGERPRINT = "fingerprint.json"


class Workspace:
    """Finished blocks of one run in `<out>.partial`, each a file that is there whole or not at all.

    Opening it holds the output path against other processes until `discard` or `close`, and takes over what an
    interrupted run of the same `fingerprint` left. fingerprint: all that decides the result (digests of the model and
    of the calibration data, configuration), as JSON; the version of polybit is added. restart: forget earlier work.

    Raises PolybitError when another process holds the output, and when the work found there is of another run, saying
    what differs.
    """

    def __init__(self, out: str | Path, fingerprint: Mapping[str, Any], *, restart: bool = False) -> None:
        self.out = absolute(Path(out))
        self.path = Workspace.place(self.out)
        wanted = json.loads(json.dumps({"polybit": polybit.__version__, **fingerprint}, allow_nan=False))
        held = ExitStack()
        held.enter_context(output_lock(self.out))
        try:
            if restart:
                shutil.rmtree(self.path, ignore_errors=True)
            if self.path.exists():
                check_fingerprint(self.path, wanted)
            with disk_errors(self.out):
                self.path.mkdir(parents=True, exist_ok=True)
                for stray in self.path.glob(".*.staged"):
                    stray.unlink(missing_ok=True)
                if not (self.path / FINGERPRINT).is_file():
                    write_json(self.path / FINGERPRINT, wanted)
        except BaseException:
            held.close()
            raise
        self.close = weakref.finalize(self, held.close)

    @staticmethod
    def place(out: Path) -> Path:
        """Where the work of an output is kept."""
        return out.with_name(f"{out.name}.partial")

    def file(self, block: str) -> Path:
        """Where a block is kept; its name is reduced to what every file system can spell."""
        digest = hashlib.sha256(block.encode()).hexdigest()[:8]
        return self.path / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', block)[:80]}-{digest}.safetensors"

    def write(self, block: str, weights: Mapping[str, QWeight]) -> None:
        """Keep the finished weights of a block; `read` gives them back exactly."""
        self.write_planes(block, {name: pack(weight) for name, weight in weights.items()})

    def write_planes(self, block: str, packed: Mapping[str, Planes]) -> None:
        """Keep weights that are packed already."""
        tensors = {f"{name}.{leaf}": t for name, p in packed.items() for leaf, t in tensors_of(p).items()}
        numbers = {name: Fields.of(planes).to_json() for name, planes in packed.items()}
        write_tensors(self.file(block), tensors, notes={"layers": json.dumps(numbers, allow_nan=False)})
        self.state(block).clear()

    def read(self, block: str) -> dict[str, QWeight] | None:
        """The weights of a finished block, None when it is not finished."""
        path = self.file(block)
        if not path.is_file():
            return None
        try:
            noted = json.loads(read_entries(path)[1]["layers"])
            places = read_places([path]) or {}
            fields = {name: Fields.from_json(name, entry) for name, entry in noted.items()}
            return {
                name: unpack(numbers.planes({leaf: places[f"{name}.{leaf}"][...] for leaf in numbers.tensors()}))
                for name, numbers in fields.items()
            }
        except (OSError, ValueError, KeyError, PolybitError) as error:
            raise PolybitError(
                f"{path} of an interrupted run cannot be read ({error!s:.100}): start again with --restart"
            ) from error

    def state(self, block: str) -> StateFile:
        """Where the state of long training of a block is kept until the block is written."""
        return StateFile(self.file(block).with_suffix(".state"))

    def places(self) -> dict[str, Place]:
        """Where every stored tensor of the finished blocks lies, by the name a checkpoint gives it."""
        return read_places(sorted(self.path.glob("*.safetensors"))) or {}

    def discard(self) -> None:
        """Remove the finished blocks, once the artefact is complete, and let the output path go."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()


class StateFile:
    """The state of long training in one file, which is there whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Tensor] | None:
        """The state that was kept last, None when none was."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not self.path.is_file():
            return None
        try:
            return load_file(self.path)
        except (SafetensorError, OSError) as error:
            raise PolybitError(
                f"{self.path} of an interrupted run cannot be read ({error!s:.100}): start again with --restart"
            ) from error

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Keep a state in the place of the last one; a disk without room for it costs the state, not the run."""
        try:
            write_tensors(self.path, state)
        except PolybitError as error:
            warn(f"progress was not kept, an interrupted run begins learned rounding anew: {error}")

    def clear(self) -> None:
        """It is not needed any more."""
        self.path.unlink(missing_ok=True)


class Visit:
    """The workspace of a run as its other processes see it, while the first one holds it."""

    def __init__(self, out: str | Path) -> None:
        self.path = Workspace.place(absolute(Path(out)))

    def discard(self) -> None:
        """Left to the first process."""

    def close(self) -> None:
        """Left to the first process."""


def check_fingerprint(path: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse the work of another run, naming the first thing that differs."""
    if not path.is_dir() or (any(path.iterdir()) and not (path / FINGERPRINT).is_file()):
        raise PolybitError(
            f"{path} is in the way and not the work of an interrupted run: move it or choose another --out"
        )
    if not any(path.iterdir()):
        return
    found = read_json(path / FINGERPRINT)
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise PolybitError(
                f"{path} holds the work of another run, whose {key} was {found.get(key)!r:.80} and not "
                f"{wanted.get(key)!r:.80}: repeat that run to finish it, or discard it with --restart"
            )


def model_digest(model) -> str:
    """Digest of every weight of the float model, so that a resumed run cannot mix two models."""
    digest = hashlib.sha256()
    for key, tensor in model.state_dict().items():
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
