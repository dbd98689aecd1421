"""Errors a user can act on, progress with an ETA, and atomic files."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class PolybitError(Exception):
    """Something the user can mend: one sentence naming the thing, the value got, the values allowed, the remedy.

    The command line prints it without a traceback and exits with status 2.
    """


def warn(sentence: str) -> None:
    """Say on stderr, in one line, what does not stop a run but may surprise."""
    print(f"polybit: warning: {sentence}", file=sys.stderr)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a sibling path to write; on success it is flushed to disk and renamed onto `path`, on failure removed.

    A reader therefore sees the old file or the new one, never a part of either.
    """
    if not path.name or "\0" in str(path):
        raise PolybitError(f"{str(path)!r} is no name of a file: give one to write to")
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.staged")
    try:
        yield staged
        with staged.open("rb") as handle:
            os.fsync(handle.fileno())
        staged.replace(path)
        fsync_directory(path.parent)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def fsync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused, because JSON has no word for them."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as staged:
        staged.write_text(text, encoding="utf-8")


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def track(items: Iterable[T], label: str, total: int | None = None, *, done: int = 0) -> Iterator[T]:
    """Iterate with a progress bar that shows elapsed time and ETA on stderr; silent when stderr is no terminal.

    `done` counts steps already finished by an earlier, interrupted run.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:  # no bar at all: it would leave a thread that draws nothing
        yield from items
        return
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(label, total=total, completed=done)
        for item in items:
            yield item
            bar.advance(task)
