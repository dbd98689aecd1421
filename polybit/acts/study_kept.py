"""Finished parts of a study, each a JSON file of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from polybit.core.runtime import write_json
from polybit.hub.files import read_json


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The JSON of a finished part, or that of making it now."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    found: dict[str, Any] = read_json(path)
    return found
