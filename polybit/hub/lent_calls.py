"""What lets a model be called whose weights are lent: blocks that fetch theirs, and a head that is read by rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from polybit.nn.convert import ends

HEAD_ROWS = 1 << 22  # weights of a head that are in memory at once


class RowReader(Protocol):
    """A matrix that is read by rows."""

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """Some rows, in float32."""
        ...


class Lender(Protocol):
    """What has the weights: hub.lent.LentModel."""

    def lend(self, path: str) -> AbstractContextManager[None]:
        """While inside, the weights below a module are there."""
        ...

    def matrix(self, key: str) -> RowReader | None:
        """A weight that is read by rows; None when it does not lie in one piece."""
        ...


@contextmanager
def lent_when_called(module: nn.Module, lend: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """While inside, the module's weights are there during each call of it; not for a `weightless` stand-in."""
    open_calls: list[ExitStack] = []

    def before(*_: Any) -> None:
        stack = ExitStack()
        if not getattr(module.forward, "weightless", False):
            stack.enter_context(lend())
        open_calls.append(stack)

    def after(*_: Any) -> None:
        if open_calls:  # a hook before this one may have failed
            open_calls.pop().close()

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for stack in open_calls:
            stack.close()


@contextmanager
def head_by_rows(model: nn.Module, source: Lender) -> Iterator[None]:
    """While inside, the output head multiplies; a float one is read some rows at a time and never there as a whole."""
    _, head = ends(model)
    name = next((path for path, module in model.named_modules() if module is head), "")
    matrix = source.matrix(f"{name}.weight") if isinstance(head, nn.Linear) else None
    if head is None or matrix is None:
        with source.lend(name):
            yield
        return
    head.forward = lambda x: multiplied(x, matrix, head.bias)
    try:
        yield
    finally:
        del head.forward


def multiplied(x: Tensor, matrix: RowReader, bias: Any) -> Tensor:
    """x W^T + bias, [..., O]; gradients reach x."""
    y: Tensor = ByRows.apply(x, matrix)
    return y if bias is None else y + bias


class ByRows(torch.autograd.Function):
    """A product with a matrix whose rows are read as they are needed, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: RowReader) -> Tensor:
        """x W^T."""
        ctx.matrix = matrix
        y = x.new_empty(*x.shape[:-1], matrix.shape[0])
        for part, rows_RI in in_parts(matrix):
            y[..., part] = nn.functional.linear(x, rows_RI.to(x))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Its gradient for x: g W."""
        given = gradients[0]
        found = given.new_zeros(*given.shape[:-1], ctx.matrix.shape[1])
        for part, rows_RI in in_parts(ctx.matrix):
            found += given[..., part] @ rows_RI.to(given)
        return found, None


def in_parts(matrix: RowReader) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time."""
    rows, columns = matrix.shape
    size = max(1, HEAD_ROWS // columns)
    for start in range(0, rows, size):
        part = slice(start, min(start + size, rows))
        yield part, matrix.rows(part.start, part.stop)
