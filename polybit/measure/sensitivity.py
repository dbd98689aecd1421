"""How much the model suffers when one layer alone is quantized: exact, one layer and width at a time.

    for reading in measure_layers(model, probes, targets, candidates):     # one decoder block at a time
        ...
    table = gather(readings, ...)["gsm8k"].table()                        # layer -> bits -> nats per token

What comes before the layer is computed once, not once per width: hidden states walk through the model with
`blocks.run_blocks`, and every candidate only runs its own block and those after it; inside the block, layers that do
not depend on the candidate give their remembered output. Memory beyond the model: one block's candidates and the
hidden states of the probes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from polybit.compress.blocks import VisitedBlock, as_stored, find_blocks, parameter_name, run_blocks
from polybit.compress.entering import answers_with_tuple, entered
from polybit.compress.source import IN_MEMORY, WeightSource
from polybit.compress.states import Room
from polybit.compress.stats import HOOKED, plain_experts
from polybit.core.records import LayerStats
from polybit.measure.probe import ProbeText, counted_log_probabilities, read_losses
from polybit.nn.convert import Target

Array = NDArray[np.float64]
Candidates = Callable[[Target, Tensor, LayerStats | None], Mapping[int, Tensor]]  # -> width -> weight [O, I]


@dataclass(slots=True)
class BlockReading:
    """What one block's layers do to every probe: sums over counted tokens of each item, in nats.

    `kl[probe][layer][width]`, `nll[...]`: float64 [items]; `nll` is what the float model's own loss rises by ·
    work: block-forwards it took, a forward of one block over one batch being 1 · naive: what running the whole model
    for every candidate would have taken.
    """

    block: int
    kl: dict[str, dict[str, dict[int, Array]]] = field(default_factory=dict)
    nll: dict[str, dict[str, dict[int, Array]]] = field(default_factory=dict)
    tokens: dict[str, Array] = field(default_factory=dict)
    float_nll: dict[str, Array] = field(default_factory=dict)
    work: float = 0.0
    naive: float = 0.0


def measure_layers(
    model: nn.Module,
    probes: Sequence[ProbeText],
    targets: Sequence[Target],
    candidates: Candidates,
    *,
    calibration: Sequence[Tensor] = (),
    only: Collection[int] | None = None,
    seed: int = 0,
    source: WeightSource = IN_MEMORY,
    room: Room | None = None,
) -> Iterator[BlockReading]:
    """Quantize each layer of each decoder block by itself and read the loss of every probe; block by block.

    candidates(target, weight, stats): the weights to try, by width; stats are those of the layer's float input over
    `calibration` (batches of token ids), None where none is given · only: indices of the blocks to measure, default
    all; the others are walked through, so that several processes can share the work · seed: nothing is drawn ·
    source, room: what lends the weights, and how much of the hidden states may be in memory; weights that are lent are
    read again for every candidate, a block at a time.
    One-at-a-time sensitivities as TASA (arXiv 2607.00908) §3 takes them. The model is never changed.
    """
    batches = [ids_BT for probe in probes for ids_BT in probe.ids]
    path, modules = find_blocks(model, targets)
    with source.calls(path):
        wraps = answers_with_tuple(model, modules[0], batches[0])
        seen: Iterable[VisitedBlock | None] = (
            run_blocks(model, calibration, targets, references=False, source=source, room=room)
            if calibration
            else (None for _ in modules)
        )
        walk = run_blocks(model, batches, targets, source=source, room=room)
        for block, calibrated in zip(walk, seen, strict=True):
            if only is None or block.index in only:
                stats = calibrated.stats() if calibrated is not None else {}
                yield measure_block(block, modules, probes, candidates, stats, wraps=wraps)
            block.finish()
            if calibrated is not None:
                calibrated.finish()


@torch.no_grad()
def measure_block(
    block: VisitedBlock,
    modules: nn.ModuleList,
    probes: Sequence[ProbeText],
    candidates: Candidates,
    stats: Mapping[str, LayerStats],
    *,
    wraps: bool,
) -> BlockReading:
    """All layers of one block at all widths on all probes."""
    tried = {t.name: candidates(t, t.weight_OI(block.model), stats.get(t.name)) for t in block.targets}
    stages = block.stages()
    suffix = Suffix(block, modules, wraps)
    reading = BlockReading(block.index)
    after = len(modules) - block.index - 1
    size = sum(target.size for target in block.targets)
    at = 0
    for probe in probes:
        rows: dict[tuple[str, int], list[tuple[Array, Array]]] = {}
        tokens, float_nll = [], []
        for ids_BT, counted_BT in zip(probe.ids, probe.counted, strict=True):
            reference_NV, outputs = suffix.reference(at, ids_BT, counted_BT)
            tokens.append(counted_BT[:, 1:].sum(1).double().numpy())
            start = read_losses(reference_NV, reference_NV, ids_BT, counted_BT).nll_B.numpy()
            float_nll.append(start)
            for stage, target in ((s, t) for s in range(len(stages)) for t in stages[s]):
                known = {n: outputs[n] for s in stages[: stage + 1] for n in names(s) if n in outputs}
                known.pop(target.name, None)
                done = sum(t.size for t in block.targets if t.name in known)
                for width, weight_OI in tried[target.name].items():
                    logits_BTV = suffix.run(at, ids_BT, {target.name: weight_OI}, known)
                    now_NV = counted_log_probabilities(logits_BTV, counted_BT)
                    losses = read_losses(now_NV, reference_NV, ids_BT, counted_BT)
                    rise = losses.nll_B.numpy() - start
                    rows.setdefault((target.name, width), []).append((losses.kl_B.numpy(), rise))
                    reading.work += after + 1 - done / size
            reading.work += after + 2  # the reference, and this block's own share of walking through the model
            reading.naive += len(modules) * (1 + sum(len(found) for found in tried.values()))
            at += 1
        reading.tokens[probe.name] = np.concatenate(tokens)
        reading.float_nll[probe.name] = np.concatenate(float_nll)
        for (name, width), parts in rows.items():
            for store, column in ((reading.kl, 0), (reading.nll, 1)):
                store.setdefault(probe.name, {}).setdefault(name, {})[width] = np.concatenate(
                    [p[column] for p in parts]
                )
    return reading


def names(targets: Iterable[Target]) -> list[str]:
    """Names of targets."""
    return [target.name for target in targets]


class Suffix:
    """The model from one block on: its own forward, entered with hidden states that are already known."""

    def __init__(self, block: VisitedBlock, modules: nn.ModuleList, wraps: bool) -> None:
        self.block, self.modules, self.wraps = block, modules, wraps
        self.device = next(block.module.parameters()).device
        self.by_name = {target.name: target for target in block.targets}

    def reference(self, index: int, ids_BT: Tensor, counted_BT: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The float model's log-probabilities [N, V] at the counted tokens of batch `index`, and what each layer of
        the block gave, for those that were called exactly once."""
        outputs: dict[str, list[Tensor]] = {}
        with ExitStack() as stack:
            for target in self.block.targets:
                if target.kind in HOOKED:

                    def note(_module: nn.Module, _args: Any, output: Tensor, name: str = target.name) -> None:
                        outputs.setdefault(name, []).append(output)

                    handle = self.block.model.get_submodule(target.module_name).register_forward_hook(note)
                    stack.callback(handle.remove)
            logits_BTV = self.run(index, ids_BT, {}, {})
        once = {name: found[0] for name, found in outputs.items() if len(found) == 1}
        return counted_log_probabilities(logits_BTV, counted_BT), once

    def run(self, index: int, ids_BT: Tensor, weights: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> Tensor:
        """Logits [B, T, V] of batch `index` with other `weights` in the block; layers in `known` are not run."""
        model = self.block.model
        stored = {
            parameter_name(self.by_name[name]): as_stored(self.by_name[name], weight_OI, model)
            for name, weight_OI in weights.items()
        }
        hidden_BTD = self.block.inputs[index].to(self.device)
        with entered(self.modules, self.block.index, hidden_BTD, self.wraps), remembered(model, known):
            if not stored:
                return model(input_ids=ids_BT.to(self.device), use_cache=False).logits
            with plain_experts(model):
                return functional_call(model, stored, (ids_BT.to(self.device),), {"use_cache": False}).logits


@contextmanager
def remembered(model: nn.Module, known: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the named layers answer with what they gave before instead of computing it."""
    modules = {name: model.get_submodule(name) for name in known}
    try:
        for name, module in modules.items():
            module.forward = lambda *_, output=known[name], **__: output
        yield
    finally:
        for module in modules.values():
            vars(module).pop("forward", None)
