"""A cheap estimate of sensitivities: one backward pass instead of one forward per layer and width.

Where the float model stands, KL(float || float) is least, so its first derivative vanishes and a layer's change E costs
1/2 E' F E, with F the Fisher information: the covariance of the gradient of log p(y) when y is drawn from the model
itself. With g the gradient at the layer's output and x its input, that is 1/2 mean (sum_t g_t' E x_t)^2.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from polybit.compress.blocks import VisitedBlock, find_blocks, run_blocks
from polybit.compress.entering import answers_with_tuple, entered
from polybit.compress.source import IN_MEMORY, WeightSource
from polybit.compress.states import HiddenStates, Room
from polybit.compress.stats import HOOKED
from polybit.core.records import LayerStats
from polybit.core.runtime import PolybitError
from polybit.measure.probe import ProbeText
from polybit.measure.sensitivity import BlockReading, Candidates
from polybit.nn.convert import Target

PASSES = 2  # label draws; each costs one backward pass more


def estimate_layers(
    model: nn.Module,
    probes: Sequence[ProbeText],
    targets: Sequence[Target],
    candidates: Candidates,
    *,
    calibration: Sequence[Tensor] = (),
    only: Collection[int] | None = None,
    passes: int = PASSES,
    seed: int = 0,
    source: WeightSource = IN_MEMORY,
    room: Room | None = None,
) -> Iterator[BlockReading]:
    """Second-order estimates of what `sensitivity.measure_layers` measures, in the same form (`nll` = `kl`).

    Fisher information with labels drawn from the model (Amari 1998), tokens of one row taken as independent: the sum
    over t of (g_t' E x_t)^2, which has a hundredth of the variance of the square of the sum. One forward walk, then per
    drawn label one forward and backward, block by block from the last to the first: memory is one block's activations
    of one batch, and before every block the hidden states of the probes and the statistics of its layers; with a room
    as much of these as it allows. only: blocks to estimate; through the others gradients are carried and no weight of
    them is quantized.
    """
    unknown = [target.name for target in targets if target.kind == "experts"]
    if unknown:
        raise PolybitError(
            f"fused experts such as {unknown[0]!r} are not estimated from gradients: measure with --sensitivity exact"
        )
    batches = [ids_BT for probe in probes for ids_BT in probe.ids]
    path, modules = find_blocks(model, targets)
    with source.calls(path):
        wraps = answers_with_tuple(model, modules[0], batches[0])
        blocks: list[VisitedBlock] = []
        for block in run_blocks(model, batches, targets, references=False, source=source, room=room):
            blocks.append(passed(block, room))
            block.finish()
            last = block.outputs
        stats: list[dict[str, LayerStats] | SpilledStats] = []
        for calibrated in (
            run_blocks(model, calibration, targets, references=False, source=source, room=room) if calibration else ()
        ):
            stats.append(calibrated.stats() if room is None else SpilledStats(calibrated.stats(), room))
            calibrated.finish()
        draws = [output_gradients(model, modules, probes, last, wraps, seed=seed + at) for at in range(passes)]
        for block in reversed(blocks):
            wanted = only is None or block.index in only
            asked = [t for t in block.targets if t.kind in HOOKED] if wanted else []
            with source.lend(block.name):
                reading = back_through(block, asked, probes, candidates, stats[block.index] if stats else {}, draws)
            if wanted:
                yield reading


def passed(block: VisitedBlock, room: Room | None) -> VisitedBlock:
    """The block with the hidden states it was handed, which stay."""
    inputs = block.inputs
    if room is not None:  # they would become its outputs
        inputs = HiddenStates(room)
        for hidden_BTD in block.inputs:
            inputs.append(hidden_BTD)
    return VisitedBlock(
        block.index, block.name, block.module, block.targets, block.model, list(block.calls), inputs, []
    )


class SpilledStats(Mapping[str, LayerStats]):
    """Statistics of a block's layers, in memory as far as a room allows."""

    def __init__(self, stats: Mapping[str, LayerStats], room: Room) -> None:
        self.tensors = HiddenStates(room)
        self.spots: dict[str, tuple[int, int, int]] = {}  # layer -> its Hessian, its magnitudes, tokens
        known: dict[int, int] = {}  # layers that read the same input share a Hessian
        for name, found in stats.items():
            for tensor in (found.hessian_II, found.absmean_I):
                if tensor.data_ptr() not in known:
                    known[tensor.data_ptr()] = len(self.tensors)
                    self.tensors.append(tensor)
            self.spots[name] = known[found.hessian_II.data_ptr()], known[found.absmean_I.data_ptr()], found.tokens

    def __getitem__(self, name: str) -> LayerStats:
        hessian, absmean, tokens = self.spots[name]
        return LayerStats(self.tensors[hessian], self.tensors[absmean], tokens)

    def __iter__(self) -> Iterator[str]:
        return iter(self.spots)

    def __len__(self) -> int:
        return len(self.spots)


def output_gradients(
    model: nn.Module,
    modules: nn.ModuleList,
    probes: Sequence[ProbeText],
    last: Sequence[Tensor],
    wraps: bool,
    *,
    seed: int,
) -> list[Tensor]:
    """Gradient of the summed loss of labels drawn from the model at the last block's output, [B, T, D] per batch."""
    generator = torch.Generator().manual_seed(seed)
    gradients = []
    at = 0
    for probe in probes:
        for ids_BT, counted_BT in zip(probe.ids, probe.counted, strict=True):
            hidden_BTD = last[at].detach().clone().requires_grad_()
            with torch.enable_grad(), entered(modules, len(modules), hidden_BTD, wraps):
                logits_BTV = model(input_ids=ids_BT.to(hidden_BTD.device), use_cache=False).logits
                log_NV = log_softmax(logits_BTV[:, :-1][counted_BT[:, 1:].to(logits_BTV.device)].float(), -1)
                drawn_N = torch.multinomial(log_NV.detach().exp().cpu(), 1, generator=generator)[:, 0]
                loss = -log_NV.gather(1, drawn_N.to(log_NV.device)[:, None]).sum()
            gradients.append(torch.autograd.grad(loss, hidden_BTD)[0])
            at += 1
    return gradients


def back_through(
    block: VisitedBlock,
    asked: Sequence[Target],
    probes: Sequence[ProbeText],
    candidates: Candidates,
    stats: Mapping[str, Any],
    draws: Sequence[list[Tensor]],
) -> BlockReading:
    """Estimates for these layers of a block; the gradients in `draws` move from its output to its input, in place."""
    with torch.no_grad():
        tried = {t.name: candidates(t, t.weight_OI(block.model), stats.get(t.name)) for t in asked}
    reading = BlockReading(block.index)
    at = 0
    for probe in probes:
        kl: dict[str, dict[int, list[Tensor]]] = {n: {w: [] for w in row} for n, row in tried.items()}
        for ids_BT in probe.ids:
            sums = {n: {w: torch.zeros(len(ids_BT), dtype=torch.float64) for w in row} for n, row in tried.items()}
            for gradients in draws:
                gradients[at] = step_back(block, at, gradients[at], tried, sums)
            for name, row in sums.items():
                for width, sum_B in row.items():
                    kl[name][width].append(sum_B / (2 * len(draws)))
            at += 1
        reading.tokens[probe.name] = torch.cat([c[:, 1:].sum(1) for c in probe.counted]).double().numpy()
        reading.kl[probe.name] = {n: {w: torch.cat(p).numpy() for w, p in row.items()} for n, row in kl.items()}
        reading.nll[probe.name] = {
            n: {w: np.array(v) for w, v in row.items()} for n, row in reading.kl[probe.name].items()
        }
    return reading


def step_back(
    block: VisitedBlock,
    index: int,
    gradient_BTD: Tensor,
    tried: Mapping[str, Mapping[int, Tensor]],
    sums: Mapping[str, Mapping[int, Tensor]],
) -> Tensor:
    """Carry the gradient of batch `index` through the block, adding (g_t' E x_t)^2 of every layer and row to `sums`."""
    weights = {target.name: target for target in block.targets}
    inputs: dict[str, Tensor] = {}
    gives: dict[str, Tensor] = {}
    handles = []
    for target in block.targets:
        if target.name in tried:

            def note(_module: nn.Module, args: Any, output: Tensor, name: str = target.name) -> None:
                inputs[name], gives[name] = args[0].detach(), output

            handles.append(block.model.get_submodule(target.module_name).register_forward_hook(note))
    hidden_BTD = block.inputs[index].detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            output = block._call({}, hidden_BTD, block.calls[index])
    finally:
        for handle in handles:
            handle.remove()
    wanted = [hidden_BTD, *gives.values()]
    found = torch.autograd.grad(output, wanted, gradient_BTD.to(output.device), allow_unused=True)
    for name, gradient in zip(gives, found[1:], strict=True):
        if gradient is None:
            continue
        weight_OI = weights[name].weight_OI(block.model).detach()
        for width, tried_OI in tried[name].items():
            error_OI = (tried_OI - weight_OI).to(inputs[name].device)
            pushed = torch.nn.functional.linear(inputs[name].float(), error_OI)
            effect = (pushed * gradient.float()).sum(-1)
            sums[name][width].add_(effect.reshape(len(hidden_BTD), -1).square().sum(1).double().cpu())
    return found[0]
