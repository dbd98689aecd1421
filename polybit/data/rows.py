"""Tables in: the rows of a .jsonl, .json or .csv file, or of a dataset on the hub, as dictionaries."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

from polybit.core.runtime import PolybitError
from polybit.data.text import dataset_rows, read_utf8

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv")


def read_rows(source: str | Path, *, split: str = "test") -> list[Row]:
    """Rows of a file by its ending, or of a dataset `owner/name[:config[:split]]`; at least one, or PolybitError."""
    path, name = Path(source), str(source)
    if path.is_file():
        rows = _read_file(path)
    elif not path.exists() and is_hub_id(name):
        dataset, config, part = [*name.split(":"), "", ""][:3]
        rows = dataset_rows(dataset, config or None, part or split)
    else:
        raise PolybitError(
            f"{name!r} is no file; give a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, or a dataset id "
            "(owner/name:config:split)."
        )
    if not rows:
        raise PolybitError(f"{name!r} has no rows; give a file with at least one.")
    return rows


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a dataset id and not of a path to a file."""
    form = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}", name)
    return bool(form) and Path(name).suffix.lower() not in SUFFIXES and not Path(name).parent.is_dir()


def _read_file(path: Path) -> list[Row]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise PolybitError(f"{str(path)!r} ends in {suffix or 'nothing'!r}; give a {' or '.join(SUFFIXES)} file.")
    text = read_utf8(path)
    if suffix == ".csv":
        return list(csv.DictReader(text.splitlines(keepends=True)))
    if suffix == ".json":
        value = _parse(text, str(path))
        rows = value if isinstance(value, list) else [value]
        return [_object(row, f"Entry {n} of {str(path)!r}") for n, row in enumerate(rows, start=1)]
    lines = ((n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip())
    return [_object(_parse(line, f"Line {n} of {str(path)!r}"), f"Line {n} of {str(path)!r}") for n, line in lines]


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PolybitError(f"{where} is not JSON ({error!s:.80}); write valid JSON.") from error


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise PolybitError(f"{where} is a {type(row).__name__}; write an object with named fields.")
    return row
