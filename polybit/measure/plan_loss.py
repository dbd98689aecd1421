"""The measured loss of a whole plan: every layer at its width at once, from codes made beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polybit.compress.blocks import VisitedBlock
from polybit.compress.source import IN_MEMORY, SourceName, WeightSource
from polybit.compress.states import Room
from polybit.core.affine import QWeight
from polybit.measure.block_files import kept_codes
from polybit.measure.passage import States, Weights, WholePassage, as_they_are
from polybit.measure.probe import Losses, ProbeText, read_losses
from polybit.nn.convert import Target

Array = NDArray[np.float64]
Bank = Mapping[str, Mapping[int, QWeight]]  # layer -> width -> its codes
REFERENCE_BYTES = 1 << 29  # the float model's distributions are kept up to this size, and computed again beyond it


@dataclass(frozen=True, slots=True)
class PlanReading:
    """What a plan does to one probe, per item: summed KL and rise of the loss in nats, and counted tokens."""

    kl_N: Array
    nll_N: Array
    tokens_N: Array

    @property
    def kl(self) -> float:
        """Nats per token."""
        return float(self.kl_N.sum() / self.tokens_N.sum())

    @property
    def nll(self) -> float:
        """Rise of the loss on the text itself, nats per token."""
        return float(self.nll_N.sum() / self.tokens_N.sum())


class PlanLoss:
    """Reads plans on probes with a bank of codes; the codes of a layer do not depend on the other layers' widths.

    Memory: the hidden states of all probes twice (with a `room` only as much of them as it allows), one block's dense
    weights, the float model's distributions at the counted tokens up to REFERENCE_BYTES or the limit of the room, and
    what the bank holds.
    source: what lends the model its weights
    """

    def __init__(
        self,
        model: nn.Module,
        probes: Sequence[ProbeText],
        targets: Sequence[Target],
        bank: Bank,
        *,
        source: WeightSource = IN_MEMORY,
        room: Room | None = None,
    ) -> None:
        self.probes, self.bank = tuple(probes), bank
        batches = [ids_BT for probe in self.probes for ids_BT in probe.ids]
        self.passage = WholePassage(model, batches, targets, source=source, room=room)
        self.as_float: States | None = None  # made at the first reading: there may be none here, but in workers
        self.kept: dict[tuple[int, int], Tensor] = {}
        most = None if room is None else room.limit
        self.left = REFERENCE_BYTES if most is None else min(most, REFERENCE_BYTES)

    def __call__(self, widths: Mapping[str, int]) -> dict[str, PlanReading]:
        """Readings by probe; layers that are not named keep their float weights."""
        return self.read(partial(self.decoded, widths))

    def decoded(self, widths: Mapping[str, int], block: VisitedBlock) -> dict[str, Tensor]:
        """The weights of one block at these widths."""
        names = [target.name for target in block.targets if target.name in widths]
        return {name: self.bank[name][widths[name]].dequantize() for name in names}

    def read(self, weights: Weights = as_they_are) -> dict[str, PlanReading]:
        """Readings by probe of any weights [O, I]."""
        if self.as_float is None:
            self.as_float = self.passage.through()
        states = self.passage.through(weights)
        found, at = {}, 0
        with self.passage.open():
            for probe in self.probes:
                kl, nll, tokens = [], [], []
                for ids_BT, counted_BT in zip(probe.ids, probe.counted, strict=True):
                    kl.append(torch.zeros(len(ids_BT), dtype=torch.float64))
                    nll.append(torch.zeros(len(ids_BT), dtype=torch.float64))
                    for span in self.passage.spans(at):
                        change = self.change(states, at, ids_BT, counted_BT, span)
                        kl[-1] += change.kl_B
                        nll[-1] += change.nll_B
                    tokens.append(counted_BT[:, 1:].sum(1))
                    at += 1
                found[probe.name] = PlanReading(*(torch.cat(part).double().numpy() for part in (kl, nll, tokens)))
        self.passage.let_go(states)
        return found

    def change(self, states: States, index: int, ids_BT: Tensor, counted_BT: Tensor, span: slice) -> Losses:
        """KL to the float model, and the rise of the loss, of the counted tokens in a span of one batch."""
        float_NV = self.reference(index, counted_BT, span)
        now_NV = self.passage.log_probabilities(states, index, counted_BT, span)
        before = read_losses(float_NV, float_NV, ids_BT[:, span], counted_BT[:, span])
        after = read_losses(now_NV, float_NV, ids_BT[:, span], counted_BT[:, span])
        return Losses(after.kl_B, after.nll_B - before.nll_B)

    def reference(self, index: int, counted_BT: Tensor, span: slice) -> Tensor:
        """The float model's log-probabilities [N, V] at the counted tokens in a span of one batch."""
        if (index, span.start) in self.kept:
            return self.kept[index, span.start]
        assert self.as_float is not None
        found_NV = self.passage.log_probabilities(self.as_float, index, counted_BT, span)
        if found_NV.nbytes <= self.left:
            self.left -= found_NV.nbytes
            self.kept[index, span.start] = found_NV
        return found_NV


class PlanReader:
    """Reads plans in a worker: the model from its path, the codes from the files of measured blocks."""

    def __init__(self, model: SourceName, probes: Sequence[ProbeText], targets: Sequence[Target], folder: Path) -> None:
        opened, where = model.open()
        self.read = PlanLoss(opened, probes, targets, kept_codes(folder), **where)

    def __call__(self, widths: Mapping[str, int]) -> dict[str, PlanReading]:
        """Readings by probe."""
        return self.read(widths)
