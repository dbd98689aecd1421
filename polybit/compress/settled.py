"""Outputs of layers whose codes are settled, kept batch by batch: no later pass of their block makes them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from polybit.nn.convert import Target

ROOM = 1 << 28  # bytes that are kept at most; layers beyond are run again
KEPT = ("linear", "conv1d")  # kinds of targets that are one call of one module


class SettledOutputs:
    """What the layers of a block gave for each batch since they run with their final weights.

    Parts of the block (its attention) are kept whole as soon as all their targets are settled. A module that is called
    more than once in a pass, or gives more than one tensor, is run again every time.
    """

    def __init__(self, block: nn.Module, name: str, targets: Sequence[Target], *, most: int = ROOM) -> None:
        self.kept: dict[tuple[str, int], Any] = {}
        self.bytes, self.most = 0, most
        self.layers = {t.name: block.get_submodule(t.module_name[len(name) + 1 :]) for t in targets if t.kind in KEPT}
        self.parts: dict[str, tuple[nn.Module, frozenset[str]]] = {}
        for child, module in block.named_children():
            inside = frozenset(t.name for t in targets if t.module_name.startswith(f"{name}.{child}."))
            if inside:
                self.parts[f"{name}.{child}"] = module, inside

    @contextmanager
    def during(self, batch: int, settled: Iterable[str]) -> Iterator[None]:
        """While inside, one pass of this batch: what is settled repeats what it gave, or is kept."""
        left = set(settled)
        calls: dict[str, int] = {}
        with ExitStack() as stack:
            for name, (module, inside) in list(self.parts.items()):
                if not inside <= left:
                    continue
                if (name, batch) in self.kept:
                    stack.enter_context(repeating(module, self.kept[name, batch]))
                    left -= inside
                else:
                    stack.callback(self.listen(module, name, batch, calls))
                    left -= {one for one in inside if (one, batch) not in self.kept}
            for name in left & self.layers.keys():
                if (name, batch) in self.kept:
                    stack.enter_context(repeating(self.layers[name], self.kept[name, batch]))
                else:
                    stack.callback(self.listen(self.layers[name], name, batch, calls))
            yield

    def listen(self, module: nn.Module, name: str, batch: int, calls: dict[str, int]) -> Callable[[], None]:
        """Keep the output of the only call of a module in this pass; returns how to stop listening."""

        def hear(_module: nn.Module, _args: object, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            first = output[0] if isinstance(output, tuple) and output else output
            others = output[1:] if isinstance(output, tuple) else ()
            if calls[name] > 1 or not isinstance(first, Tensor) or any(one is not None for one in others):
                self.parts.pop(name, None)
                self.layers.pop(name, None)
                self.drop(name, batch)
                return
            if name in self.parts:  # its layers need not be known any more
                for inside in self.parts[name][1]:
                    self.drop(inside, batch)
            size = first.numel() * first.element_size()
            if self.bytes + size <= self.most:
                self.bytes += size
                self.kept[name, batch] = copied(output)

        return module.register_forward_hook(hear).remove

    def drop(self, name: str, batch: int) -> None:
        """Keep it no longer."""
        output = self.kept.pop((name, batch), None)
        if output is not None:
            first = output[0] if isinstance(output, tuple) else output
            self.bytes -= first.numel() * first.element_size()


def copied(output: Any) -> Any:
    """A tensor, or a tuple of one tensor and nothing else, that nobody else writes into."""
    if isinstance(output, tuple):
        return (output[0].detach().clone(), *output[1:])
    return output.detach().clone()


@contextmanager
def repeating(module: nn.Module, output: Any) -> Iterator[None]:
    """While inside, calls of the module give copies of this output."""
    own = vars(module).get("forward")
    module.forward = lambda *_args, **_kwargs: copied(output)
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
