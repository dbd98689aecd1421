"""Rows of any file people have: .txt, .jsonl, .json, .csv, .tsv, .parquet, these packed with gzip; and hub datasets."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from polybit.core.runtime import PolybitError, check_spelling, warn

Form = Literal["text", "lines", "json", "table", "parquet"]
FORMS: dict[str, Form] = {
    ".txt": "text",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "table",
    ".tsv": "table",
    ".parquet": "parquet",
}
PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
LARGEST = 8 << 30  # bytes of a file once it is unpacked
ROWS_KEYS = ("data", "rows", "examples", "instances", "train", "questions")  # lists of rows inside one JSON object
HALVES = re.compile("[\ud800-\udfff]")  # of a character that UTF-16 writes as a pair
NAMED = "a .txt, .jsonl, .json, .csv, .tsv or .parquet file (also as .gz)"

Row = tuple[str, Any]  # where it stands, as errors name it; a text, or what JSON holds there


def form_of(path: Path) -> Form | None:
    """What a file's name says it holds, None for a name that says nothing we read."""
    return FORMS.get(bare(path).suffix.lower())


def bare(path: Path) -> Path:
    """The name without the ending of its packing."""
    return path.with_suffix("") if path.suffix.lower() in PACKED else path


def read_file(path: Path) -> list[Row]:
    """The rows of a file by its ending; a .txt file is one text. Blank lines are no rows.

    Raises PolybitError for what cannot be read, naming the line.
    """
    check_spelling(path)
    form, name = form_of(path), str(path)
    if path.is_dir():
        raise PolybitError(f"{name!r} is a directory; give {NAMED}.")
    if form is None:
        ending = f"ends in {path.suffix!r}" if path.suffix else "has no ending that says what it holds"
        raise PolybitError(f"{name!r} {ending}; give {NAMED}.")
    if form == "parquet":
        found = list(numbered(parquet_rows(path), "Row", name))
    else:
        text = read_utf8(path)
        if form == "text":
            return [(repr(name), text)]
        found = table(text, bare(path), name) if form == "table" else list(parsed(text, form, name))
    return whole(found)


def read_utf8(path: Path) -> str:
    """A file's text with Unix line ends, unpacked where its name says so; whatever is not UTF-8 text is refused."""
    check_spelling(path)
    opened = PACKED.get(path.suffix.lower(), Path.open)
    try:
        with opened(path, "rb") as handle:
            data = handle.read(LARGEST + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PolybitError(
            f"Text {str(path)!r} cannot be read ({reason}); check the file and its permissions."
        ) from error
    if len(data) > LARGEST:
        raise PolybitError(f"Text {str(path)!r} has more than {LARGEST >> 30} GiB; give a part of it.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PolybitError(
            f"Text {str(path)!r} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); convert it to UTF-8."
        ) from error
    if "\x00" in text:
        raise PolybitError(f"Text {str(path)!r} contains NUL bytes, so it is binary; give UTF-8 text.")
    return text.replace("\r\n", "\n")


def parse_json(text: str, where: str, form: str = "valid JSON") -> Any:
    """A JSON value; anything else, and JSON nested deeper than Python follows, is refused."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PolybitError(f"{where} is not JSON ({error.msg}); write {form}.") from error
    except (RecursionError, ValueError) as error:  # ValueError: a number of more than 4300 digits
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise PolybitError(f"{where} is not JSON that can be read ({reason:.80}); write {form}.") from error


def parsed(text: str, form: Form, name: str) -> Iterator[Row]:
    """Rows of JSON: one value per line, or a list, or an object that holds a list of rows."""
    if form == "json" or text.lstrip()[:1] == "[":
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            # lines in a file called .json are common; so are lists in one called .jsonl
            if form == "json" and "Extra data" not in str(error):
                parse_json(text, repr(name))
        else:
            if isinstance(value, dict):
                inner = [value[key] for key in ROWS_KEYS if isinstance(value.get(key), list)]
                value = inner[0] if inner and all(isinstance(row, dict) for row in inner[0]) else [value]
            if form == "json" or (isinstance(value, list) and all(isinstance(row, dict) for row in value)):
                yield from numbered(value if isinstance(value, list) else [value], "Entry", name)
                return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"Line {number} of {name!r}"
            yield where, parse_json(line, where, "one JSON object per line")


def numbered(rows: Sequence[Any], word: str, name: str) -> Iterator[Row]:
    """Rows with the place of each."""
    for number, row in enumerate(rows, start=1):
        yield f"{word} {number} of {name!r}", row


def table(text: str, path: Path, name: str) -> list[Row]:
    """Rows of a .csv or .tsv file by its header; semicolons, as spreadsheets of many countries write them, are seen."""
    csv.field_size_limit(sys.maxsize)  # a document may be longer than the library's 128 KiB
    header = text.partition("\n")[0]
    mark = "\t" if path.suffix.lower() == ".tsv" else ";" if ";" in header and "," not in header else ","
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=mark))
    except csv.Error as error:
        raise PolybitError(f"{name!r} cannot be read as a table ({error}); mend its quotes.") from error
    for number, row in enumerate(rows, start=1):
        if None in row:  # a text with a comma and without quotes: its end would be lost
            raise PolybitError(f"Row {number} of {name!r} has more fields than the header; put texts in quotes.")
    return list(numbered(rows, "Row", name))


def whole(rows: Sequence[Row]) -> list[Row]:
    """The rows with every half of a character pair (a lone surrogate, which no text has) replaced, and said so."""
    found: list[Row] = []
    mended: list[str] = []
    for where, row in rows:
        try:
            made = mend(row)
        except RecursionError:
            raise PolybitError(f"{where} is nested too deeply; write flat objects.") from None
        if made is not row:
            mended.append(where)
        found.append((where, made))
    if mended:
        more = f" (and {len(mended) - 1} more)" if len(mended) > 1 else ""
        warn(f"{mended[0]}{more} holds half a character, a lone surrogate: U+FFFD stands in its place")
    return found


def mend(value: Any) -> Any:
    """The value with no lone surrogate in any of its texts; the same object where there is none."""
    if isinstance(value, str):
        return value if value.isascii() or is_whole(value) else HALVES.sub("\ufffd", value)
    if isinstance(value, list):
        made = [mend(item) for item in value]
        return made if any(new is not old for new, old in zip(made, value, strict=True)) else value
    if isinstance(value, dict):
        pairs = [(mend(key), mend(item)) for key, item in value.items()]
        same = all(a is c and b is d for (a, b), (c, d) in zip(pairs, value.items(), strict=True))
        return value if same else dict(pairs)
    return value


def is_whole(text: str) -> bool:
    """Whether a text can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def library(what: str) -> Any:
    """The library `datasets`, or one sentence that says how to get it."""
    try:
        import datasets
    except ImportError as error:
        raise PolybitError(
            f"Reading {what} needs the library datasets, which is not installed; "
            "run pip install 'polybit[data]' or give a .txt, .jsonl, .json or .csv file."
        ) from error
    return datasets


def parquet_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .parquet file."""
    reader = library(f"{str(path)!r}")
    try:
        return list(reader.Dataset.from_parquet(str(path), keep_in_memory=True))
    except Exception as error:  # truncated, no parquet at all, packed twice: the remedy is the same
        raise PolybitError(f"{str(path)!r} cannot be read as parquet ({reason_of(error)}); write it again.") from error


def saved_rows(folder: Path, *, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a folder that `Dataset.save_to_disk` wrote; of one with several splits, the one called train."""
    reader = library(f"{str(folder)!r}")
    try:
        found = reader.load_from_disk(str(folder))
        if hasattr(found, "keys"):
            found = found["train"] if "train" in found else found[next(iter(found))]
        return [dict(row) for row in (found if limit is None else found.take(min(limit, len(found))))]
    except Exception as error:
        raise PolybitError(
            f"{str(folder)!r} cannot be read as a dataset ({reason_of(error)}); save it again."
        ) from error


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def dataset_rows(dataset: str, config: str | None, split: str, *, limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of a dataset on the hub, the first `limit` of them; raises PolybitError with the reason when it cannot."""
    reader = library(f"the dataset {dataset!r}")
    try:
        rows = reader.load_dataset(dataset, config, split=split, streaming=True)
        return [dict(row) for row in (rows if limit is None else rows.take(limit))]
    except Exception as error:  # offline, unknown id or split: whatever the library raises, the remedy is the same
        raise PolybitError(
            f"Dataset {dataset!r} (configuration {config or 'default'}, split {split}) could not be read: "
            f"{reason_of(error)}; check the id and the connection, or give a file."
        ) from error


def reason_of(error: Exception) -> str:
    """The first line of somebody else's error, short."""
    return str(error).splitlines()[0][:200] if str(error).strip() else type(error).__name__
