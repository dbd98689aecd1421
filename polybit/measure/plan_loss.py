"""The measured loss of a whole plan: every layer at its width at once, from codes made beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polybit.compress.blocks import Whole
from polybit.core.affine import QWeight
from polybit.hub.load import load_float
from polybit.hub.models import resolve
from polybit.measure.block_files import kept_codes
from polybit.measure.probe import ProbeText, counted_log_probabilities, read_losses
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

    Memory: the bank (a byte per weight and width), one dense copy of the model's weights, and the float model's
    distributions at the counted tokens.
    """

    def __init__(self, model: nn.Module, probes: Sequence[ProbeText], targets: Sequence[Target], bank: Bank) -> None:
        self.whole = Whole(model, tuple(targets))
        self.probes, self.bank = tuple(probes), bank
        self.kept: dict[tuple[int, int], Tensor] = {}
        self.room = REFERENCE_BYTES

    def __call__(self, widths: Mapping[str, int]) -> dict[str, PlanReading]:
        """Readings by probe; layers that are not named keep their float weights."""
        return self.read({name: self.bank[name][width].dequantize() for name, width in widths.items()})

    @torch.no_grad()
    def read(self, weights: Mapping[str, Tensor]) -> dict[str, PlanReading]:
        """Readings by probe of any weights [O, I]."""
        found = {}
        for number, probe in enumerate(self.probes):
            kl, nll, tokens = [], [], []
            for index, (ids_BT, counted_BT) in enumerate(zip(probe.ids, probe.counted, strict=True)):
                reference_NV = self.reference(number, index)
                before = read_losses(reference_NV, reference_NV, ids_BT, counted_BT)
                after = read_losses(
                    counted_log_probabilities(self.whole.forward(weights, ids_BT), counted_BT),
                    reference_NV,
                    ids_BT,
                    counted_BT,
                )
                kl.append(after.kl_B)
                nll.append(after.nll_B - before.nll_B)
                tokens.append(counted_BT[:, 1:].sum(1))
            found[probe.name] = PlanReading(*(torch.cat(part).double().numpy() for part in (kl, nll, tokens)))
        return found

    def reference(self, number: int, index: int) -> Tensor:
        """The float model's log-probabilities [N, V] at the counted tokens of one batch."""
        if (number, index) in self.kept:
            return self.kept[number, index]
        probe = self.probes[number]
        found_NV = counted_log_probabilities(self.whole.forward({}, probe.ids[index]), probe.counted[index])
        size = found_NV.numel() * found_NV.element_size()
        if size <= self.room:
            self.room -= size
            self.kept[number, index] = found_NV
        return found_NV


class PlanReader:
    """Reads plans in a worker: the model from its path, the codes from the files of measured blocks."""

    def __init__(
        self, model: str, probes: Sequence[ProbeText], targets: Sequence[Target], folder: Path, trust_remote_code: bool
    ) -> None:
        loaded, _ = load_float(resolve(model), trust_remote_code=trust_remote_code)
        self.read = PlanLoss(loaded.requires_grad_(False), probes, targets, kept_codes(folder))

    def __call__(self, widths: Mapping[str, int]) -> dict[str, PlanReading]:
        """Readings by probe."""
        return self.read(widths)
