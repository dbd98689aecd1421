"""Collect what calibration sees at the inputs of layers: Hessians, column magnitudes, token counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from polybit.core.records import LayerStats
from polybit.core.runtime import PolybitError
from polybit.nn.convert import EXPERT_WEIGHTS, Target, is_experts

HOOKED = ("linear", "conv1d", "head")


SHARE = 192  # columns of a Gram matrix that are multiplied at a time: what lies below its diagonal is copied


@dataclass(frozen=True, slots=True)
class CallSums:
    """x xT and |x| summed over the tokens of one call, float32."""

    outer_II: Tensor
    absolute_I: Tensor
    tokens: int

    @classmethod
    def of(cls, x: Tensor) -> CallSums:
        """The sums of one input, any leading dimensions."""
        x_TI = x.detach().reshape(-1, x.shape[-1]).float()
        return cls(outer_product(x_TI), torch.linalg.vector_norm(x_TI, 1, 0), x_TI.shape[0])


def outer_product(x_TI: Tensor) -> Tensor:
    """xT x, which is symmetric: little more than half of the products of a plain one."""
    columns = x_TI.shape[1]
    outer_II = x_TI.new_empty(columns, columns)
    for start in range(0, columns, SHARE):
        here = slice(start, min(start + SHARE, columns))
        torch.mm(x_TI[:, here].T, x_TI[:, start:], out=outer_II[here, start:])
        outer_II[here.stop :, here] = outer_II[here, here.stop :].T
    return outer_II


class Gram:
    """Running sums over one layer's input tokens: x xT and |x|, float32 on the layer's device."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.outer_II = torch.zeros(columns, columns, device=device)
        self.absolute_I = torch.zeros(columns, device=device)
        self.tokens = 0

    def add(self, call: CallSums) -> None:
        """Add the tokens of one call."""
        self.outer_II += call.outer_II
        self.absolute_I += call.absolute_I
        self.tokens += call.tokens

    def stats(self) -> LayerStats:
        """Means over the tokens seen; zeros where no token came (an expert that was never chosen)."""
        count = max(self.tokens, 1)
        return LayerStats(self.outer_II / count, self.absolute_I / count, self.tokens)


class InsideExperts(TorchFunctionMode):
    """Hand every linear call on an expert's slice of a fused weight to `seen`, told apart by its shape."""

    def __init__(self, seen: Callable[[tuple[int, ...], Tensor], None]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear:
            self.seen(tuple(args[1].shape), args[0])
        return func(*args, **(kwargs or {}))


class LatestInput:
    """Layers that read one input one after another (q, k, v; gate, up) get the same sums, made once."""

    def __init__(self) -> None:
        self.x: Tensor | None = None
        self.version = 0
        self.found: CallSums | None = None

    def sums(self, x: Tensor) -> CallSums:
        """The sums of x, unless it is the very tensor that came last and nothing was written to it since."""
        version = -1 if x.is_inference() else x._version
        if self.found is None or self.x is not x or version == -1 or version != self.version:
            self.x, self.version, self.found = x, version, CallSums.of(x)
        return self.found

    def forget(self) -> None:
        """Let go of it: nothing that comes can be the same."""
        self.x = self.found = None


class Enough(Exception):
    """Raised inside a forward once every watched layer was called, where the caller needs nothing further."""


@contextmanager
def watch(model: nn.Module, targets: Iterable[Target], *, stop: bool = False) -> Iterator[dict[str, Gram]]:
    """While inside, sum the inputs of `targets` over every forward of `model` or of a block of it.

    stop: leave each forward by raising `Enough` when all of them were called (never with experts, whose calls cannot
    be counted ahead).

    Fused experts: one Gram per fused weight, over the tokens routed to any of its experts, each counted once per
    expert it went to. Embeddings have no input to watch and are left out.
    """
    grams: dict[str, Gram] = {}
    latest = LatestInput()
    targets = list(targets)
    stop = stop and all(target.kind in HOOKED for target in targets)
    called: set[str] = set()

    def see(name: str, x: Tensor) -> None:
        grams[name].add(latest.sums(x))
        called.add(name)
        if stop and len(called) == len(grams):
            called.clear()
            latest.forget()
            raise Enough

    with ExitStack() as stack:
        for target in targets:
            if target.kind == "embedding":
                continue
            module = model.get_submodule(target.module_name)
            gram = grams[target.name] = Gram(target.columns, target.parameter(model).device)
            if target.kind in HOOKED:
                hook = module.register_forward_pre_hook(lambda _, args, name=target.name: see(name, args[0]))
                stack.callback(hook.remove)
            else:
                shape = (target.rows // target.experts, target.columns)
                stack.enter_context(watch_experts(module, shape, gram))
        stack.enter_context(plain_experts(model))
        yield grams


@contextmanager
def watch_experts(module: nn.Module, shape: tuple[int, int], gram: Gram) -> Iterator[None]:
    """Sum the inputs of the fused weight of `module` whose single experts have `shape`."""

    def seen(called: tuple[int, ...], x: Tensor) -> None:
        if called == shape:
            gram.add(CallSums.of(x))

    modes: list[InsideExperts] = []

    def enter(_module: nn.Module, _args: Any) -> None:
        modes.append(InsideExperts(seen))
        modes[-1].__enter__()

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        modes.pop().__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def counted_experts(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """While inside, count the tokens that each expert of the named Experts modules gets: name -> int64 [experts]."""
    counts: dict[str, Tensor] = {}

    def count(module: nn.Module, args: Any, kwargs: Any, name: str) -> None:
        chosen = args[1] if len(args) > 1 else kwargs.get("top_k_index")
        if isinstance(chosen, Tensor) and not chosen.is_floating_point():
            weight: Any = getattr(module, EXPERT_WEIGHTS[0])
            experts = int(getattr(module, "num_experts", 0) if isinstance(weight, nn.Module) else weight.shape[0])
            found = torch.bincount(chosen.flatten().clamp(0, experts).cpu(), minlength=experts + 1)[:experts]
            counts[name] = counts.get(name, 0) + found

    with ExitStack() as stack:
        for name in names:
            hook = lambda module, args, kwargs, name=name: count(module, args, kwargs, name)  # noqa: E731
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield counts


@contextmanager
def plain_experts(model: nn.Module) -> Iterator[None]:
    """Let fused experts run one by one through plain linear calls, whose inputs can be seen; restored afterwards."""
    configs: dict[int, Any] = {
        id(m.config): m.config for m in model.modules() if is_experts(m) and hasattr(m, "config")
    }
    before = [(config, getattr(config, "_experts_implementation", None)) for config in configs.values()]
    try:
        for config, _ in before:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation


@torch.no_grad()
def collect(model: nn.Module, batches: Sequence[Tensor], targets: Iterable[Target]) -> dict[str, LayerStats]:
    """Statistics of any targets, measured in one pass of the whole float model over `batches` of token ids [B, T].

    Memory: one Hessian of I x I float32 per target, all at a time. For whole models prefer `blocks.run_blocks`, which
    holds those of one block; this serves targets outside the blocks (an output head) and small models.
    """
    if not batches:
        raise PolybitError("calibration has 0 batches: give at least one window of text")
    with watch(model, targets) as grams:
        for ids_BT in batches:
            model(input_ids=ids_BT.to(next(model.parameters()).device), use_cache=False)
    return {name: gram.stats() for name, gram in grams.items()}
