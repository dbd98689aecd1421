"""Finished measurements of a long run, kept in one JSON file so that the same command goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polybit.core.runtime import PolybitError, sweep, write_json


class Journal:
    """Key -> finished measurement in a file that is whole at every moment.

    fingerprint: all that decides the measurements; a file of another run is refused unless `restart`.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], *, restart: bool = False) -> None:
        self.path = path
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.done: dict[str, Any] = {}
        if path.exists() and not restart:
            self.done = self.read()

    def read(self) -> dict[str, Any]:
        """What an interrupted run of the same fingerprint has finished."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            found, done = content["fingerprint"], dict(content["done"])
        except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise PolybitError(f"{self.path} is no journal of a run: remove it or give --restart") from error
        if found != self.fingerprint:
            keys = sorted(k for k in {*found, *self.fingerprint} if found.get(k) != self.fingerprint.get(k))
            raise PolybitError(
                f"{self.path} belongs to a run with another {', '.join(keys)}: give --restart to begin anew, or "
                "another output"
            )
        return done

    def put(self, key: str, value: Any) -> None:
        """Note a finished measurement on disk."""
        self.done[key] = value
        write_json(self.path, {"fingerprint": self.fingerprint, "done": self.done})

    def remove(self) -> None:
        """The run is complete."""
        self.path.unlink(missing_ok=True)
        sweep(self.path)
