"""Tables in: the rows of a file or of a dataset on the hub, as dictionaries."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from polybit.core.runtime import PolybitError
from polybit.data.files import NAMED, bare, dataset_rows, form_of, parse_json, read_file, read_utf8

Row = dict[str, Any]


def read_rows(source: str | Path, *, split: str = "test") -> list[Row]:
    """Rows of a file by its ending, or of a dataset `owner/name[:config[:split]]`; at least one, or PolybitError."""
    path, name = Path(source), str(source)
    if path.is_file():
        rows = _read_file(path)
    elif not path.exists() and is_hub_id(name):
        dataset, config, part = [*name.split(":"), "", ""][:3]
        rows = dataset_rows(dataset, config or None, part or split)
    else:
        raise PolybitError(f"{name!r} is no file; give {NAMED}, or a dataset id (owner/name:config:split).")
    if not rows:
        raise PolybitError(f"{name!r} has no rows; give a file with at least one.")
    return rows


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a dataset id and not of a path to a file."""
    form = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]*){0,2}", name)
    return bool(form) and form_of(Path(name)) is None and not Path(name).parent.is_dir()


def _read_file(path: Path) -> list[Row]:
    name = str(path)
    if form_of(path) in (None, "text"):
        raise PolybitError(
            f"{name!r} ends in {path.suffix or 'nothing'!r}; give a .jsonl, .json, .csv or .parquet file."
        )
    if bare(path).suffix.lower() == ".json":
        # an object is one row here: SQuAD's nested articles are read by those who know them
        text = read_utf8(path)
        if text.lstrip()[:1] == "{":
            try:
                return [_object(parse_json(text, repr(name)), name)]
            except PolybitError as error:
                if "Extra data" not in str(error):
                    raise
    return [_object(row, where) for where, row in read_file(path)]


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise PolybitError(f"{where} is a {type(row).__name__}; write an object with named fields.")
    return row
