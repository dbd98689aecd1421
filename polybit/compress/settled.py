"""Outputs of layers whose codes are settled, kept batch by batch: no later pass of their block makes them again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from polybit.nn.convert import Target

ROOM = 1 << 28  # bytes that are kept at most; layers beyond are run again
KEPT = ("linear", "conv1d")  # kinds of targets that are one call of one module


class SettledOutputs:
    """What layers gave for each batch since they run with their final weights.

    A layer of which more than one call is seen in a batch is run again every time.
    """

    def __init__(self, model: nn.Module, targets: Sequence[Target]) -> None:
        self.modules = {t.name: model.get_submodule(t.module_name) for t in targets if t.kind in KEPT}
        self.kept: dict[tuple[str, int], Tensor] = {}
        self.bytes = 0

    @contextmanager
    def during(self, batch: int, settled: Iterable[str]) -> Iterator[None]:
        """While inside, one pass of this batch: layers in `settled` repeat what they gave, or it is kept."""
        calls: dict[str, int] = {}
        with ExitStack() as stack:
            for name in settled:
                module = self.modules.get(name)
                if module is None:
                    continue
                found = self.kept.get((name, batch))
                if found is None:
                    listen = self.listener(name, batch, calls)
                    stack.callback(module.register_forward_hook(listen).remove)
                else:
                    stack.enter_context(repeating(module, found))
            yield

    def listener(self, name: str, batch: int, calls: dict[str, int]) -> Callable[[nn.Module, object, Tensor], None]:
        """A forward hook that keeps the output of the only call."""

        def listen(_module: nn.Module, _args: object, output: Tensor) -> None:
            calls[name] = calls.get(name, 0) + 1
            size = output.numel() * output.element_size()
            if calls[name] > 1:
                self.modules.pop(name, None)
                self.kept.pop((name, batch), None)
            elif self.bytes + size <= ROOM:
                self.bytes += size
                self.kept[name, batch] = output.detach().clone()

        return listen


@contextmanager
def repeating(module: nn.Module, output: Tensor) -> Iterator[None]:
    """While inside, calls of the module give copies of this output: what comes later may write into it."""
    own = vars(module).get("forward")
    module.forward = lambda *_args, **_kwargs: output.clone()
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
