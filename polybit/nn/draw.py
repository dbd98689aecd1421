"""Random precision per prompt: every prompt of a batch is answered at its own drawn precision.

The layers are the only place where precision matters, so a batch is split there: each layer multiplies the rows of one
precision at a time. A prompt keeps its draw for as long as its cache lives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from polybit.core.runtime import PolybitError
from polybit.nn.linear import QuantExperts, TiedHead
from polybit.nn.operands import CACHE_NAMES

Put = Callable[[int], None]  # sets one layer to the precision of a choice


def draw(choices: int, prompts: int, generator: torch.Generator) -> list[int]:
    """The choice 0..choices-1 of each prompt, uniform and independent."""
    return torch.randint(choices, (prompts,), generator=generator).tolist()


class Rows:
    """Which choice every row of the running batch has."""

    def __init__(self, choices: int, generator: torch.Generator) -> None:
        self.choices, self.generator = choices, generator
        self.drawn: list[int] = []

    def begin(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before a forward pass: new prompts get a draw, equal rows beside each other (beams) the same one."""
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        source = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim), None)
        source = given.get("input_ids") if given.get("input_ids") is not None else source
        assert source is not None, "a forward pass has an input"
        if cache is not None and cache.get_seq_length():
            if len(source) != len(self.drawn):
                raise PolybitError(
                    f"the batch changed from {len(self.drawn)} to {len(source)} rows while it was being answered at "
                    "random precision: tell nn.switch.keep_rows which rows stay"
                )
            return
        fresh = iter(draw(self.choices, len(source), self.generator))
        found: list[int] = []
        for row, choice in enumerate(fresh):
            again = row and torch.equal(source[row], source[row - 1])
            found.append(found[-1] if again else choice)
        self.drawn = found

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows go on."""
        self.drawn = [self.drawn[row] for row in rows]

    def split(self, forward: Callable[..., Tensor], put: Put, x: Tensor) -> Tensor:
        """A layer's forward, the rows of one choice at a time."""
        drawn = torch.tensor(self.drawn, device=x.device)
        if len(x) != len(drawn):  # tokens of all rows one after another
            assert len(drawn) and len(x) % len(drawn) == 0, "tokens of a batch come row by row"
            drawn = drawn.repeat_interleave(len(x) // len(drawn))
        result: Tensor | None = None
        for choice in drawn.unique().tolist():
            rows = (drawn == choice).nonzero()[:, 0]
            put(choice)
            part = forward(x[rows])
            result = part.new_empty(len(x), *part.shape[1:]) if result is None else result
            result = result.index_copy(0, rows, part)
        assert result is not None
        return result


@contextmanager
def split_batches(model: nn.Module, rows: Rows, puts: dict[nn.Module, Put]) -> Iterator[None]:
    """Let every layer of `puts` (layer -> how to set it) work row by row of a choice during the body."""
    mixed = next((name for name, module in model.named_modules() if isinstance(module, QuantExperts)), None)
    if mixed is not None:
        raise PolybitError(f"{mixed!r} mixes the tokens of all prompts in its experts: draw the precision per pass")
    owners = dict(puts)
    for module in model.modules():
        if isinstance(module, TiedHead) and module.source[0] in puts:
            owners[module] = puts[module.source[0]]
    for module, put in owners.items():
        module.__dict__["forward"] = partial(rows.split, module.forward, put)
    hook = model.register_forward_pre_hook(rows.begin, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        for module in owners:
            del module.__dict__["forward"]
