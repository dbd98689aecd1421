"""Where `quantize` has the float model from: a skeleton that is lent one block at a time, or all of it in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from polybit.compress.mix_files import read_mix
from polybit.compress.source import IN_MEMORY, WeightSource
from polybit.compress.states import Room
from polybit.compress.text import AUTO, SELF, auto_source
from polybit.core.memory import allowed_bytes, fits, return_large
from polybit.core.runtime import PolybitError
from polybit.hub.gguf_file import is_gguf
from polybit.hub.lent import LentModel, open_lent
from polybit.hub.load import guarded, load_float, load_tokenizer
from polybit.hub.models import is_embedded, resolve
from polybit.hub.pieces import Pieces
from polybit.hub.workspace import Workspace, model_digest
from polybit.options.quantize import QuantizeOptions

FLOAT_BYTES = 4  # of a weight in memory
STATES_SHARE = 32  # one part in so many of the memory allowed is for hidden states


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

    def room(self, store: Workspace) -> Room | None:
        """Memory for hidden states, and where the rest of them lies."""
        return None if self.lent is None else Room(self.allowed // STATES_SHARE, store.path)

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


def open_float(name: str, options: QuantizeOptions, *, whole: bool) -> FloatSource:
    """The float model, lent block by block unless it is needed as a `whole` or its files cannot be read so."""
    allowed = allowed_bytes(options.memory)
    path = resolve(name)
    lent = None if whole or is_gguf(path) else open_lent(path, trust_remote_code=options.trust_remote_code)
    if lent is None:
        model, tokenizer = load_float(path, trust_remote_code=options.trust_remote_code)
        return FloatSource(model, tokenizer, None, allowed)
    return_large()
    tokenizer = load_tokenizer(path, trust_remote_code=options.trust_remote_code)
    return FloatSource(guarded(lent.model, tokenizer), tokenizer, lent, allowed)


def float_bytes(model: nn.Module) -> int:
    """Bytes of the model in memory as a whole."""
    return FLOAT_BYTES * sum(parameter.numel() for parameter in model.parameters())


def writes_its_text(name: str, options: QuantizeOptions) -> bool:
    """Whether the model has to write its own calibration text."""
    if options.mix is not None:
        return SELF in read_mix(options.mix)
    source = options.calibration
    return (auto_source(embedded=is_embedded(name)) if source == AUTO else source) == SELF


@contextmanager
def writer(name: str, source: FloatSource, options: QuantizeOptions) -> Iterator[nn.Module]:
    """A model that can write text: the one in memory, or one loaded for this and let go; a skeleton where none is
    needed.

    Raises PolybitError where it would not fit.
    """
    if source.lent is None or not writes_its_text(name, options):
        yield source.model
        return
    size = float_bytes(source.model)
    if not fits(size, options.memory):
        raise PolybitError(
            f"{name} is to write its own calibration text and needs {size / 1e9:.1f} GB for that, more than may be "
            "used: give --calibration with a text file or a named set, or more --memory"
        )
    model, _ = load_float(resolve(name), trust_remote_code=options.trust_remote_code)
    yield model
