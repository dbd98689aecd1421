"""Walk through a model block by block: what each layer sees, and what a block gives back once it is quantized.

    for block in run_blocks(model, batches, targets(model)):
        quantized = read_from_disk(block) or quantize(block)     # block.stats(), block.forward(...), block.wanted(i)
        block.finish({name: q.dequantize() for name, q in quantized.items()})

Memory beyond the model: the hidden states of all batches (twice: as the float model and as the quantized prefix make
them; with a Room only as much of them as it allows) and the statistics of one block, whatever the depth. With a source
that lends weights (hub.lent), the model itself is a block at a time. The model is never changed. Everything is a
function of the model, the batches and the weights given to `finish`: a run that finds some blocks on disk and only
propagates through them ends bit for bit where an uninterrupted one ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from polybit.compress.settled import SettledOutputs
from polybit.compress.source import IN_MEMORY, WeightSource
from polybit.compress.states import HiddenStates, Room, let_go
from polybit.compress.stats import Enough, counted_experts, plain_experts, watch
from polybit.compress.unlike import Captured, in_words, not_in_a_row
from polybit.core.records import LayerStats
from polybit.core.runtime import PolybitError
from polybit.nn.convert import Target

States = list[Tensor] | HiddenStates  # hidden states, one [B, T, D] per batch
Weights = Mapping[str, Tensor]  # target name -> weight [O, I]; a target that is missing keeps its float weight


@dataclass(slots=True)
class Call:
    """The arguments a block receives beside its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(slots=True)
class VisitedBlock:
    """One decoder block and the batches on their way through it.

    inputs: hidden states as the quantized prefix makes them, one [B, T, D] per batch · references: as the float model
    makes them (the same list while nothing is quantized) · room: where hidden states are kept; inputs then become
    outputs in place, and are not those of this block any more once it is finished · settled: outputs kept between
    `stats` and `finish`, for a caller that gives every target its final weight only once · expert_tokens: how many
    tokens went to each expert, by module, once it is finished.
    """

    index: int
    name: str
    module: nn.Module
    targets: tuple[Target, ...]
    model: nn.Module
    calls: list[Call]
    inputs: States
    references: States
    keeps_references: bool = True
    room: Room | None = None
    outputs: States = field(default_factory=list)
    settled: SettledOutputs | None = None
    expert_tokens: dict[str, Tensor] = field(default_factory=dict)
    _wanted: States = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.room is not None:
            self._wanted = HiddenStates(self.room)

    @property
    def batches(self) -> int:
        """Number of calibration batches."""
        return len(self.inputs)

    def weights(self) -> dict[str, Tensor]:
        """The float weights of the block's targets, [O, I]."""
        return {target.name: target.weight_OI(self.model) for target in self.targets}

    def forward(self, weights: Weights, index: int, *, reference: bool = False) -> Tensor:
        """Output [B, T, D] for batch `index` with `weights` in place of the block's own; gradients reach `weights`.

        Input: what the quantized prefix hands over, or with `reference` what the float model would.
        """
        hidden_BTD = (self.references if reference else self.inputs)[index]
        return self._call(weights, hidden_BTD.to(self._device()), self.calls[index])

    def pass_on(self, weights: Weights, index: int, *, reference: bool = False) -> Tensor:
        """`forward` without gradients, in which settled layers repeat what they gave before."""
        if self.settled is None or reference:
            return self.forward(weights, index, reference=reference)
        with self.settled.during(index, weights):
            return self.forward(weights, index)

    @torch.no_grad()
    def wanted(self, index: int) -> Tensor:
        """What the float model gives after this block for batch `index`: the target of reconstruction."""
        assert self.keeps_references or not self.index, "run_blocks was told to leave the float path out"
        while len(self._wanted) <= index:
            self._wanted.append(self.forward({}, len(self._wanted), reference=True).to(self.references[0].device))
        return self._wanted[index].to(self._device())

    @torch.no_grad()
    def stats(
        self, targets: Sequence[Target] | None = None, *, given: Weights | None = None, reference: bool = False
    ) -> dict[str, LayerStats]:
        """Statistics of the inputs of `targets` (default: all of the block) over all batches.

        given: weights already quantized in this block, so that later layers see what these make of the input (one
        `stage` after another) · reference: on the float model's hidden states instead of the quantized prefix's.
        """
        with watch(self.model, self.targets if targets is None else targets, stop=True) as grams:
            for index in range(self.batches):
                with suppress(Enough):
                    self.pass_on(given or {}, index, reference=reference)
        return {name: gram.stats() for name, gram in grams.items()}

    @torch.no_grad()
    def stats_and_outputs(self) -> dict[str, LayerStats]:
        """`stats` of all targets in the one pass of the float block that `finish` then need not make again."""
        keep = self.inputs[0].device if self.inputs else None
        with watch(self.model, self.targets) as grams:
            self.outputs = self._sent_on(lambda index: self.forward({}, index).to(keep))
        return {name: gram.stats() for name, gram in grams.items()}

    @torch.no_grad()
    def stages(self) -> list[tuple[Target, ...]]:
        """The targets in the order they run, together where they read the same input (q, k, v; gate, up).

        Without text there is no order: all at once.
        """
        if not self.inputs:
            return [self.targets]
        seen: dict[str, int] = {}  # target -> storage of its input; kept alive by `kept` so that none is reused
        kept: list[Tensor] = []
        handles = []
        for target in self.targets:

            def note(_module: nn.Module, args: Any, name: str = target.name) -> None:
                kept.append(args[0])
                seen.setdefault(name, args[0].data_ptr())

            handles.append(self.model.get_submodule(target.module_name).register_forward_pre_hook(note))
        try:
            self.forward({}, 0)
        finally:
            for handle in handles:
                handle.remove()
        groups: dict[tuple[int, str], list[Target]] = {}
        by_name = {target.name: target for target in self.targets}
        for name in [*seen, *(n for n in by_name if n not in seen)]:
            target = by_name[name]
            # the two fused expert weights share a module but run one after the other
            leaf = target.name.rpartition(".")[2] if target.kind == "experts" else ""
            groups.setdefault((seen.get(name, 0), leaf), []).append(target)
        return [tuple(group) for group in groups.values()]

    @torch.no_grad()
    def finish(self, weights: Weights | None = None) -> None:
        """Send the batches on: through `weights` where given (usually dequantized), through float weights elsewhere."""
        if not self.inputs or (self.outputs and not weights):
            return
        if self.keeps_references:
            self.wanted(self.batches - 1)
            if not weights and self.inputs is self.references:
                self.outputs = self._wanted
                return
        keep = self.inputs[0].device
        self.outputs = self._sent_on(lambda index: self.pass_on(weights or {}, index).to(keep))
        self.settled = None

    def _sent_on(self, output: Callable[[int], Tensor]) -> States:
        """The outputs of all batches, in the place of the inputs where hidden states have a room."""
        experts = {target.module_name for target in self.targets if target.kind == "experts"}
        with counted_experts(self.model, sorted(experts)) as self.expert_tokens:
            if self.room is None:
                return [output(index) for index in range(self.batches)]
            for index in range(self.batches):
                self.inputs[index] = output(index)
            return self.inputs

    def _device(self) -> torch.device:
        return next(self.module.parameters()).device

    def _call(self, weights: Weights, hidden_BTD: Tensor, call: Call) -> Tensor:
        chosen = {target: weights[target.name] for target in self.targets if target.name in weights}
        stored = {
            parameter_name(target).removeprefix(f"{self.name}."): as_stored(target, weight_OI, self.model)
            for target, weight_OI in chosen.items()
        }
        with plain_experts(self.module):
            output = functional_call(self.module, stored, (hidden_BTD, *call.args), call.kwargs)
        return output[0] if isinstance(output, (tuple, list)) else output


@dataclass(slots=True)
class Whole:
    """The whole model as a function of its targets' weights, for training all of them at once."""

    model: nn.Module
    targets: tuple[Target, ...]

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks."""
        return find_blocks(self.model, self.targets)[1]

    def forward(self, weights: Weights, ids_BT: Tensor) -> Tensor:
        """Logits [B, T, V] with `weights` in place of the model's own; gradients reach `weights`."""
        return self._call(weights, ids_BT).logits

    def states(self, weights: Weights, ids_BT: Tensor, most: int = 8) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the hidden states [B, T, D] after up to `most` blocks, evenly spread, the last one among them."""
        output = self._call(weights, ids_BT, output_hidden_states=True)
        hidden = list(output.hidden_states[1:])
        every = -(-len(hidden) // most)
        return output.logits, hidden[::-1][::every]

    def _call(self, weights: Weights, ids_BT: Tensor, **kwargs: bool) -> Any:
        stored = {
            parameter_name(target): as_stored(target, weights[target.name], self.model)
            for target in self.targets
            if target.name in weights
        }
        with plain_experts(self.model):
            return functional_call(self.model, stored, (ids_BT,), {"use_cache": False, **kwargs})


def run_blocks(
    model: nn.Module,
    batches: Sequence[Tensor],
    targets: Sequence[Target],
    *,
    references: bool = True,
    source: WeightSource = IN_MEMORY,
    room: Room | None = None,
) -> Iterator[VisitedBlock]:
    """Visit the decoder blocks of a causal language model in order; `finish` each block before taking the next.

    batches: token ids [B, T], the calibration text · references: also take the float model's hidden states along, which
    `wanted` and reconstruction need and statistics do not; a third of the time without · source: what lends the weights
    of a block while it is visited · room: how much of the hidden states may be in memory (None: all of them).
    Targets outside the blocks (embedding, output head) are not visited: see `outside`, and `stats.collect`.
    """
    if not batches:
        raise PolybitError("calibration has 0 batches: give at least one window of text")
    name, modules = find_blocks(model, targets)
    with source.entry(name, f"{name}.0"):
        inputs, calls = enter_blocks(model, modules, batches, [] if room is None else HiddenStates(room))
    follow = inputs
    for index, module in enumerate(modules):
        path = f"{name}.{index}"
        inside = tuple(target for target in targets if target.name.startswith(f"{path}."))
        with source.lend(path):
            block = VisitedBlock(index, path, module, inside, model, calls[index], inputs, follow, references, room)
            yield block
        assert len(block.outputs) == len(batches), "block.finish was not called"
        let_go((inputs, follow), (block.outputs, block._wanted))
        inputs, follow = block.outputs, block._wanted
        calls[index] = []


def visit_blocks(
    model: nn.Module, targets: Sequence[Target], *, source: WeightSource = IN_MEMORY
) -> Iterator[VisitedBlock]:
    """The decoder blocks in order with no text on its way through them, for methods that look at weights alone."""
    name, modules = find_blocks(model, targets)
    for index, module in enumerate(modules):
        path = f"{name}.{index}"
        inside = tuple(target for target in targets if target.name.startswith(f"{path}."))
        with source.lend(path):
            yield VisitedBlock(index, path, module, inside, model, [], [], [], keeps_references=False)


def outside(model: nn.Module, targets: Sequence[Target]) -> list[Target]:
    """Targets that belong to no decoder block."""
    name, _ = find_blocks(model, targets)
    return [target for target in targets if not target.name.startswith(f"{name}.")]


def find_blocks(model: nn.Module, targets: Sequence[Target]) -> tuple[str, nn.ModuleList]:
    """(path, list) of the decoder blocks: the ModuleList that holds most of the weights to quantize.

    The outermost such list: a list of experts inside a block never holds more than the blocks do.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            held = sum(target.size for target in targets if target.name.startswith(f"{name}."))
            if held and (best is None or held > best[0]):
                best = (held, name, module)
    if best is None:
        raise PolybitError(
            f"{type(model).__name__} has no list of decoder blocks that holds weights to quantize: "
            "give a decoder-only language model"
        )
    return best[1], best[2]


@torch.no_grad()
def enter_blocks(
    model: nn.Module, modules: nn.ModuleList, batches: Sequence[Tensor], hidden: States
) -> tuple[States, list[list[Call]]]:
    """Hidden states before the first block, per batch (put into `hidden`, which is empty), and what every block is
    called with beside them [block][batch].

    The blocks are passed over while the model's own forward calls them, so masks, position embeddings and
    per-layer arguments are the model's own, at the price of one embedding look-up.
    """
    calls: list[list[Call]] = [[] for _ in modules]
    device = next(modules.parameters()).device
    with passed_over(modules) as record:
        for ids_BT in batches:
            record.clear()
            with suppress(Captured), in_words(model):
                model(input_ids=ids_BT.to(device), use_cache=False)
            if len(record) != len(modules):
                raise not_in_a_row(model, f"{len(record)} calls of {len(modules)} blocks")
            hidden.append(record[0][0])
            for index, (_, call) in enumerate(record):
                earlier = [calls[index - 1][-1]] if index else []
                calls[index].append(shared(call, earlier + calls[index][-1:]))
    return hidden, calls


@contextmanager
def passed_over(modules: nn.ModuleList) -> Iterator[list[tuple[Tensor, Call]]]:
    """Replace every block's forward by one that notes its arguments and returns its hidden states unchanged."""
    record: list[tuple[Tensor, Call]] = []

    def stand_in(module: nn.Module, is_last: bool) -> Callable[..., Any]:
        original = type(module).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs = dict(kwargs)
            hidden_BTD = args[0] if args else kwargs.pop("hidden_states")
            record.append((hidden_BTD, Call(tuple(args[1:]), kwargs)))
            if is_last:
                raise Captured
            if not answers:
                answers.append(original(module, hidden_BTD, *args[1:], **kwargs))
            answer = answers[0]
            return type(answer)((hidden_BTD, *answer[1:])) if type(answer) in (tuple, list) else hidden_BTD

        forward.weightless = True  # type: ignore[attr-defined]  # the first block's weights are there, others' not needed
        return forward

    answers: list[Any] = []  # what the first block gives back: a tensor, or a tuple or list that begins with it
    try:
        for index, module in enumerate(modules):
            module.forward = stand_in(module, index == len(modules) - 1)
        yield record
    finally:
        for module in modules:
            vars(module).pop("forward", None)


def shared(call: Call, earlier: Sequence[Call]) -> Call:
    """The call with every tensor that equals one of an earlier call replaced by it, so masks are kept once."""

    def share(value: Any, others: Sequence[Any]) -> Any:
        if isinstance(value, Tensor):
            for other in others:
                if other is value or (
                    isinstance(other, Tensor) and other.dtype == value.dtype and torch.equal(other, value)
                ):
                    return other
        elif isinstance(value, tuple):
            rows = [other for other in others if isinstance(other, tuple) and len(other) == len(value)]
            return tuple(share(item, [row[i] for row in rows]) for i, item in enumerate(value))
        return value

    args = share(call.args, [other.args for other in earlier])
    return Call(args, {key: share(v, [o.kwargs.get(key) for o in earlier]) for key, v in call.kwargs.items()})


def parameter_name(target: Target) -> str:
    """Path of the parameter a target stands for."""
    return target.name if target.kind == "experts" else f"{target.name}.weight"


def as_stored(target: Target, weight_OI: Tensor, model: nn.Module) -> Tensor:
    """A weight [O, I] in the layout and dtype of the target's own parameter; differentiable."""
    parameter = target.parameter(model)
    weight = weight_OI.T if target.kind == "conv1d" else weight_OI
    return weight.reshape(parameter.shape).to(device=parameter.device, dtype=parameter.dtype)
