"""Text on its way through a model with other weights, block by block: what a plan, or a mixture, does to the whole.

    passage = WholePassage(model, batches, targets)
    states = passage.through(lambda block: {"model.layers.0.mlp.up_proj": weight_OI, ...})
    passage.log_probabilities(states, 0, counted_BT)     # [N, V]; of a large vocabulary by `spans`

Memory: the hidden states of all batches, one block's weights, and with a source that lends them no more of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from polybit.compress.blocks import VisitedBlock, find_blocks, run_blocks
from polybit.compress.entering import answers_with_tuple, entered
from polybit.compress.source import IN_MEMORY, WeightSource
from polybit.compress.states import Room, let_go
from polybit.core.runtime import track
from polybit.measure.probe import counted_log_probabilities
from polybit.nn.convert import Target, ends

Weights = Callable[[VisitedBlock], Mapping[str, Tensor]]  # a block's other weights [O, I], by target
EVERYTHING = slice(None)
LOGITS = 1 << 25  # numbers in logits that are compared at once, of which there are about five such tensors
States = Sequence[Tensor]  # [B, T, D] per batch


def as_they_are(_block: VisitedBlock) -> Mapping[str, Tensor]:
    """The float model."""
    return {}


def weights_of(dense: Mapping[str, Tensor]) -> Weights:
    """Weights that are all in memory."""
    return lambda block: {target.name: dense[target.name] for target in block.targets if target.name in dense}


class WholePassage:
    """Takes batches of token ids [B, T] through a model, as often as is asked.

    source: what lends a block's weights · room: how much of the hidden states may be in memory (default: all)
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Tensor],
        targets: Sequence[Target],
        *,
        source: WeightSource = IN_MEMORY,
        room: Room | None = None,
    ) -> None:
        self.model, self.batches, self.targets = model, batches, targets
        self.source, self.room = source, room
        self.path, self.modules = find_blocks(model, targets)
        head = ends(model)[1]
        self.words = int(getattr(head, "out_features", 1))
        with self.open():
            self.wraps = answers_with_tuple(model, self.modules[0], batches[0])

    @torch.no_grad()
    def through(self, weights: Weights = as_they_are, *, label: str | None = None) -> States:
        """Hidden states behind the last block; `weights` is asked block by block, in order, and once each.

        label: of the progress that is shown (default: none is)
        """
        block = None
        walk = run_blocks(self.model, self.batches, self.targets, references=False, source=self.source, room=self.room)
        for block in walk if label is None else track(walk, label, len(self.modules)):
            block.finish(weights(block))
        assert block is not None
        return block.outputs

    def let_go(self, states: States) -> None:
        """Give the room of hidden states back."""
        let_go((states,), ())

    @contextmanager
    def open(self) -> Iterator[None]:
        """While inside, what follows the blocks is there; opened once for many batches, it is read once."""
        with self.source.calls(self.path):
            yield

    def spans(self, index: int) -> Iterator[slice]:
        """Stretches of the positions of batch `index` whose logits are about LOGITS numbers, at least two positions.

        The last position of one is the first of the next: what it predicts counts there.
        """
        rows, length = self.batches[index].shape
        size = max(1, LOGITS // (rows * self.words))
        for start in range(0, max(1, length - 1), size):
            yield slice(start, min(start + size + 1, length))

    def logits(self, states: States, index: int, span: slice = EVERYTHING) -> Tensor:
        """Logits [B, T, V] of some positions of batch `index`; to be called inside `open`. What follows the blocks sees
        each position by itself."""
        hidden_BTD = states[index][:, span]
        ids_BT = self.batches[index][:, span].to(hidden_BTD.device)
        with torch.no_grad(), entered(self.modules, len(self.modules), hidden_BTD, self.wraps):
            found: Tensor = self.model(input_ids=ids_BT, use_cache=False).logits
        return found

    def log_probabilities(self, states: States, index: int, counted_BT: Tensor, span: slice = EVERYTHING) -> Tensor:
        """Log-probabilities [N, V] in float32 of the counted tokens in a span; to be called inside `open`."""
        return counted_log_probabilities(self.logits(states, index, span), counted_BT[:, span])
