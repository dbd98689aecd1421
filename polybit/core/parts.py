"""Tables of parts: every kind of part is a literal dict in a room's `table.py`, torch-free, read by all who need it.

A part names its function by a dotted path, `polybit.quant.gptq:gptq`, which is imported when it is first used, so that
`--help`, refusals and docs can walk a table without loading torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

from polybit.core.runtime import PolybitError

P = TypeVar("P")


@cache
def load(path: str) -> Any:
    """What a dotted path such as `polybit.quant.gptq:gptq` names."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def pick(table: Mapping[str, P], name: str, what: str) -> P:
    """The part of that name, refused with the names there are; `what` is what a user calls the kind of part."""
    if name not in table:
        raise PolybitError(f"{what} {name!r:.80} is not known: choose {listed(table)}")
    return table[name]


def listed(names: Iterable[str]) -> str:
    """Names as a sentence lists them: `a, b or c`."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def described(table: Mapping[str, Any]) -> str:
    """`name = summary` of every part, for the help of a flag; each part has a `summary`."""
    return "; ".join(f"{name} = {part.summary}" for name, part in table.items())
