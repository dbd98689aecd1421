"""Where an act has the float model from: a skeleton that is lent one block at a time, or all of it in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from polybit.compress.source import IN_MEMORY, SourceName, WeightSource
from polybit.compress.states import Room
from polybit.compress.text import AUTO, SELF, auto_source
from polybit.core.memory import allowed_bytes, fits, return_large
from polybit.core.runtime import PolybitError, warn
from polybit.hub.gguf_file import is_gguf
from polybit.hub.lent import LentModel, open_lent
from polybit.hub.load import fetch, guarded, load_float, load_tokenizer, quantization_of
from polybit.hub.models import device_of, resolve
from polybit.hub.pieces import Pieces, read_places
from polybit.hub.workspace import Workspace, model_digest

FLOAT_BYTES = 4  # of a weight in memory
STATES_SHARE = 32  # one part in so many of the memory allowed is for hidden states


class Loading(Protocol):
    """The options of an act that say how a model is loaded."""

    @property
    def memory(self) -> float | None:
        """Gigabytes the run keeps to."""
        ...

    @property
    def device(self) -> str:
        """auto, cpu or cuda."""
        ...

    @property
    def trust_remote_code(self) -> bool:
        """Whether code of the model's repository may run."""
        ...


@dataclass(slots=True)
class FloatSource:
    """The float model of a run.

    model: with its weights, or a skeleton where `lent` lends them a block at a time
    allowed: bytes of memory the run was given
    """

    model: nn.Module
    tokenizer: Any
    lent: LentModel | None
    allowed: int

    @property
    def weights(self) -> WeightSource:
        """What the loop asks for weights."""
        return IN_MEMORY if self.lent is None else self.lent

    def room(self, folder: Path | None = None) -> Room | None:
        """Memory for hidden states, and the folder for the rest of them (default: the system's for such files)."""
        return None if self.lent is None else Room(self.allowed // STATES_SHARE, folder or Path(tempfile.gettempdir()))

    def by_name(self, name: str, options: Loading) -> SourceName:
        """What a worker opens for itself."""
        states = None if self.lent is None else self.allowed // STATES_SHARE
        return SourceName(resolve(name), options.trust_remote_code, self.lent is not None, states)

    @property
    def where(self) -> dict[str, Any]:
        """What a walk through the model's blocks is told of it."""
        return {"source": self.weights, "room": self.room()}

    def digest(self) -> str:
        """Digest of all float weights."""
        return model_digest(self.model) if self.lent is None else self.lent.digest()

    def pieces(self, store: Workspace) -> Pieces | None:
        """The values of the checkpoint: codes from the finished blocks, the rest from the float model's files."""
        if self.lent is None:
            return None
        lent, places = self.lent, store.places()

        def read(name: str) -> Iterator[Tensor]:
            return places[name].pieces() if name in places else lent.pieces(name)

        return read


def open_float(name: str, options: Loading, *, whole: bool) -> FloatSource:
    """The float model, lent block by block unless it is needed as a `whole` or its files cannot be read so."""
    allowed, device = allowed_bytes(options.memory), device_of(options.device)
    path = resolve(name)
    lent = None if whole or is_gguf(path) else open_lent(path, trust_remote_code=options.trust_remote_code)
    if lent is None:
        model, tokenizer = load_float(path, trust_remote_code=options.trust_remote_code)
        return FloatSource(model.to(device), tokenizer, None, allowed)
    return_large(allowed)
    tokenizer = load_tokenizer(path, trust_remote_code=options.trust_remote_code)
    return FloatSource(guarded(lent.on(device).model, tokenizer), tokenizer, lent, allowed)


def open_fitting(name: str, options: Loading, *, whole_for: str | None = None, models: int = 1) -> FloatSource:
    """The float model in memory where it fits there, else lent block by block.

    whole_for: what of the options needs it as a whole; then one that does not fit is refused · models: how many copies
    have to fit, workers each have one
    """
    path = resolve(name)
    size = loaded_bytes(path, trust_remote_code=options.trust_remote_code)
    if size == 0 or fits(size * models, options.memory):
        return open_float(name, options, whole=True)
    if whole_for is not None:
        raise PolybitError(
            f"{whole_for} needs all of {name} in memory, {size / 1e9:.1f} GB, more than may be used: leave it out, or "
            "give more --memory"
        )
    source = open_float(name, options, whole=False)
    if source.lent is None:
        warn(f"{name} cannot be read a block at a time: all of it is in memory, {size / 1e9:.1f} GB, more than is free")
    return source


def loaded_bytes(path: str, *, trust_remote_code: bool) -> int:
    """Bytes of a model's weights in memory, by the headers of its files; 0 for one that is never read by blocks."""
    if is_gguf(path):
        return 0
    quantization_of(path, trust_remote_code=trust_remote_code)  # refuses a name that is none
    directory = Path(path) if Path(path).is_dir() else fetch(path)
    places = read_places(sorted(directory.glob("*.safetensors"))) or {}
    sizes = ((prod(p.shape), FLOAT_BYTES if p.dtype.is_floating_point else p.dtype.itemsize) for p in places.values())
    return sum(count * size for count, size in sizes)


def float_bytes(model: nn.Module) -> int:
    """Bytes of the model in memory as a whole."""
    return FLOAT_BYTES * sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def writer(name: str, source: FloatSource, options: Loading, *, writes: bool) -> Iterator[nn.Module]:
    """A model that can write text: the one in memory, or one loaded for this and let go; a skeleton where it need not.

    writes: whether the text is to be the model's own. Raises PolybitError where it would not fit.
    """
    if source.lent is None or not writes:
        yield source.model
        return
    size = float_bytes(source.model)
    if not fits(size, options.memory):
        raise PolybitError(
            f"{name} is to write its own calibration text and needs {size / 1e9:.1f} GB for that, more than may be "
            "used: name a text file or a named set instead, or give more --memory"
        )
    model, _ = load_float(resolve(name), trust_remote_code=options.trust_remote_code)
    yield model.to(device_of(options.device))


def is_own_text(source: str, *, embedded: bool) -> bool:
    """Whether a source of text is what the model writes itself."""
    return (auto_source(embedded=embedded) if source == AUTO else source) == SELF
