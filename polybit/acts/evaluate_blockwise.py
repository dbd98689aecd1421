"""An LM for text alone whose weights stay in their files: all batches go through one block after another.

lm.read_ahead(batches, presets)   # hidden states behind the last block, kept or spilled
lm.logits(ids_BT)                 # what follows the blocks, the head by rows
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from polybit.compress.sizes import base_model
from polybit.compress.states import Room
from polybit.core.memory import allowed_bytes, return_large
from polybit.core.runtime import PolybitError, warn
from polybit.evals.table import SUITES
from polybit.hub.checkpoint import METHOD
from polybit.hub.gguf_file import is_gguf
from polybit.hub.lent import LentModel, open_lent
from polybit.hub.lent_checkpoint import open_lent_checkpoint
from polybit.hub.lm import LocalLM
from polybit.hub.load import checkpoint_tokenizer, guarded, load_config, load_tokenizer, quantization_of
from polybit.hub.models import resolve
from polybit.measure.passage import States, WholePassage
from polybit.nn.convert import Target, targets
from polybit.options.evaluate import EvalOptions

STATES_SHARE = 32  # one part in so many of the memory allowed is for hidden states
LOGITS = 1 << 22  # numbers in one tensor of logits, of which eight are there at once


class BlockwiseLM(LocalLM):
    """Reads text as a `LocalLM` does, to rounding, with one block of weights in memory; it cannot write any.

    targets: of the float model, which tell where its blocks are · memory: bytes that hidden states may take, those
    beyond go to a file
    """

    def __init__(self, source: LentModel, tokenizer: Any, targets: Sequence[Target], memory: int) -> None:
        super().__init__(source.model, tokenizer, keep_decoded=False, batch_logits=LOGITS)
        self.source, self.targets = source, targets
        self.room = Room(memory, Path(tempfile.gettempdir()))
        self.preset: str | None = None
        self.passage: WholePassage | None = None
        self.states: dict[str | None, States] = {}
        self.places: dict[bytes, int] = {}
        self.open = ExitStack()  # holds what follows the blocks, once logits are asked for
        self.is_open = False

    @property
    def device(self) -> torch.device:
        """Where blocks are while they are lent."""
        return torch.device("cpu")

    @contextmanager
    def at(self, preset: str | None) -> Iterator[LocalLM]:
        """As in memory."""
        before = self.preset
        with super().at(preset):
            self.preset = before if preset is None else preset
            try:
                yield self
            finally:
                self.preset = before

    def read_ahead(self, batches: Sequence[Tensor], presets: Sequence[str | None]) -> None:
        """Take batches of token ids [B, T] through all blocks at each preset, and forget earlier ones."""
        self.forget()
        if not batches:
            return
        self.passage = WholePassage(self.model, batches, self.targets, source=self.source, room=self.room)
        self.places = {key_of(ids_BT): index for index, ids_BT in enumerate(batches)}
        for preset in presets:
            with self.at(preset):
                self.states[preset] = self.passage.through(label="blocks")

    def forget(self) -> None:
        """Give back what was read ahead."""
        self.open.close()
        self.is_open = False
        for states in self.states.values():
            assert self.passage is not None
            self.passage.let_go(states)
        self.states, self.places, self.passage = {}, {}, None

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Logits float32 [B, T, V] of a batch that was read ahead."""
        assert self.passage is not None
        if not self.is_open:
            self.open.enter_context(self.passage.open())
            self.is_open = True
        return self.passage.logits(self.states[self.preset], self.places[key_of(ids_BT)]).float()

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise PolybitError(
            f"{self.source.name} is read block by block, which is too slow to write answers or to score pairs of "
            "texts: leave them out (--answers 0), or give more --memory"
        )

    generate = generate_tokens = loglik = loglik_tokens = _refuse


def key_of(ids_BT: Tensor) -> bytes:
    """A batch as the key of what was read ahead."""
    return repr(tuple(ids_BT.shape)).encode() + ids_BT.contiguous().numpy().tobytes()


def noted_base(target: str, *, trust_remote_code: bool) -> str | None:
    """The model a checkpoint says it was made from; None for a float model."""
    name = resolve(target)
    if is_gguf(name):
        return None
    return base_model(SimpleNamespace(config=load_config(name, trust_remote_code=trust_remote_code)))


def open_blockwise(name: str, options: EvalOptions) -> BlockwiseLM | None:
    """A float model or a polybit checkpoint that is read by blocks; None where only the whole can be loaded."""
    allowed, trust = allowed_bytes(options.memory), options.trust_remote_code
    return_large(allowed)
    memory = allowed // STATES_SHARE
    if quantization_of(name, trust_remote_code=trust) == METHOD:
        checkpoint = open_lent_checkpoint(name, trust_remote_code=trust)
        tokenizer = checkpoint_tokenizer(name, trust_remote_code=trust)
        guarded(checkpoint.model, tokenizer)
        return BlockwiseLM(checkpoint, tokenizer, checkpoint.targets, memory)
    lent = open_lent(name, trust_remote_code=trust)
    if lent is None:
        return None
    tokenizer = load_tokenizer(name, trust_remote_code=trust)
    guarded(lent.model, tokenizer)
    return BlockwiseLM(lent, tokenizer, targets(lent.model), memory)


def of_text_alone(target: str, options: EvalOptions, *, embedded: bool) -> EvalOptions:
    """The options of a run by blocks: free answers are left out with a warning, what else needs them is refused."""
    asked = ["--tasks"] if options.tasks else [f"--{SUITES[name].flag.replace('_', '-')}" for name in options.suites]
    asked += ["--breakdown"] if options.breakdown else []
    why = f"{target} and its reference do not fit into memory and are read block by block"
    if asked:
        raise PolybitError(f"{asked[0]} writes or scores answers, and {why}: leave it out, or give more --memory")
    if options.text is None and not embedded:
        raise PolybitError(f"{why}, which is too slow to write a text: give one with --text, or more --memory")
    if options.answers:
        warn(f"{why}: no free answers are written; --answers 0 leaves them out in silence")
    return replace(options, answers=0)
