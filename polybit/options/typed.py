"""A record of options from plain values, as a TOML file or a flag spells them; what does not fit is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from polybit.core.parts import listed
from polybit.core.runtime import PolybitError

R = TypeVar("R")


def record(kind: type[R], values: Mapping[str, Any]) -> R:
    """The record of that kind with these fields; names may be spelled with hyphens."""
    kinds = get_type_hints(kind)
    return kind(
        **{at: typed(kinds[at], value, at) for at, value in ((k.replace("-", "_"), v) for k, v in values.items())}
    )


def check_fields(kind: type, values: Mapping[str, Any], verb: str, left_out: tuple[str, ...] = ()) -> None:
    """Refuse names that are no flag of the verb, or among those that are decided elsewhere."""
    known = {field.name for field in fields(kind)} - set(left_out)
    unknown = sorted(name for name in values if name.replace("-", "_") not in known)
    if unknown:
        raise PolybitError(
            f"{unknown[0]!r} is no flag of polybit {verb} that can be set here: use {', '.join(sorted(known))}"
        )


def typed(kind: Any, value: Any, name: str) -> Any:
    """A value as a field's annotation wants it: a number as text, text as a path, one of the choices."""
    if get_origin(kind) in (Union, UnionType):
        if value is None:
            return None
        (kind,) = (one for one in get_args(kind) if one is not NoneType)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise refused(name, value, listed(map(str, get_args(kind))))
        return value
    if get_origin(kind) is list:
        return [typed(get_args(kind)[0], one, name) for one in (value if isinstance(value, list) else [value])]
    if kind is bool or isinstance(value, bool):
        if kind is not bool or not isinstance(value, bool):
            raise refused(name, value, "true or false" if kind is bool else f"a {kind.__name__}")
        return value
    if kind in (str, Path):
        return kind(str(value))
    if not isinstance(value, (int, float) if kind is float else int):
        raise refused(name, value, "a number" if kind is float else "a whole number")
    return kind(value)


def refused(name: str, value: Any, allowed: str) -> PolybitError:
    """What to raise for a value of the wrong kind."""
    return PolybitError(f"--{name.replace('_', '-')} {value!r:.60} is not possible: give {allowed}")
