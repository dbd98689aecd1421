"""Options as they would be typed on a command line."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any


def words(flags: Mapping[str, Any]) -> list[str]:
    """Flags and their values, a truth as --flag or --no-flag."""
    typed: list[str] = []
    for key, value in flags.items():
        flag = key.replace("_", "-")
        typed += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return typed


def command_line(verb: str, model: str, options: Any, *, leave_out: tuple[str, ...] = ()) -> str:
    """The command that repeats a run: what has no default, then what differs from its default."""
    told = {field.name: getattr(options, field.name) for field in fields(options) if field.name not in leave_out}
    defaults = {field.name: field.default for field in fields(options)}
    needed = {name: value for name, value in told.items() if defaults[name] is MISSING}
    changed = {name: value for name, value in told.items() if name not in needed and value != defaults[name]}
    return shlex.join(["polybit", verb, model, *words(needed), *words(changed)])
