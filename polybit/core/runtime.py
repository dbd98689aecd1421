"""Errors a user can act on, progress with an ETA, and atomic files."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from platform import node
from time import monotonic
from typing import Any, Protocol, TypeVar
from zlib import crc32

T = TypeVar("T")
LINE_EVERY = 30.0  # seconds between lines of progress where there is no terminal
MACHINE = f"{crc32(node().encode()):08x}"  # of a name of a file that another machine must leave alone


class PolybitError(Exception):
    """Something the user can mend: one sentence naming the thing, the value got, the values allowed, the remedy.

    The command line prints it without a traceback and exits with status 2.
    """


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up, in the words of torch, of the system or of C++."""
    said = str(error).lower()
    words = ("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc")
    return isinstance(error, MemoryError) or any(word in said for word in words)


def warn(sentence: str) -> None:
    """Say on stderr, in one line, what does not stop a run but may surprise."""
    if Shown.warnings:
        print(f"polybit: warning: {sentence}", file=sys.stderr)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a sibling path to write; on success it is flushed to disk and renamed onto `path`, on failure removed.

    A reader therefore sees the old file or the new one, never a part of either.
    """
    if not path.name or "\0" in str(path):
        raise PolybitError(f"{str(path)!r} is no name of a file: give one to write to")
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path)
    staged = path.with_name(staged_name(path.name))
    try:
        yield staged
        with staged.open("rb") as handle:
            os.fsync(handle.fileno())
        staged.replace(path)
        fsync_directory(path.parent)
    except BaseException as error:
        with suppress(OSError):  # it cannot be there on a disk that is read-only, or under a name that is too long
            staged.unlink(missing_ok=True)
        if isinstance(error, OSError) and str(error.filename) in ("None", str(staged)):  # the sentence names the file
            error.filename = str(path)
        raise


def check_spelling(path: Path | str) -> None:
    """Refuse a name whose bytes are no UTF-8: safetensors and tokenizers can open no such file."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise PolybitError(f"{str(path)!a} is no name in UTF-8, which other libraries need: rename it") from None


def staged_name(name: str) -> str:
    """Under which name this process writes a file before it takes its own."""
    return f".{name}.{MACHINE}.{os.getpid()}.staged"


def nearest(path: Path) -> Path:
    """A path itself, or the nearest above it that is there and that this user may see."""
    for found in (path.absolute(), *path.absolute().parents):
        try:
            if found.exists():
                return found
        except OSError:  # below a closed folder, or longer than a name can be
            continue
    return Path(path.absolute().anchor)


def sweep(path: Path) -> None:
    """Remove what killed processes of this machine had begun to write in the place of a file."""
    begins, ends = f".{path.name}.{MACHINE}.", ".staged"
    with os.scandir(path.parent) as entries:
        names = [each.name for each in entries if each.name.startswith(begins) and each.name.endswith(ends)]
    for name in names:
        number = name[len(begins) : -len(ends)]
        if number.isdecimal() and not is_running(int(number)):
            path.with_name(name).unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Whether a process of this number is there."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def fsync_directory(path: Path) -> None:
    """Make renames inside a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def json_text(value: Any) -> str:
    """JSON as our files hold it; NaN and infinity are refused, because JSON has no word for them."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "replace").decode()  # half a character becomes "?"


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    with atomic_path(path) as staged:
        staged.write_text(json_text(value), encoding="utf-8")


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def track(items: Iterable[T], label: str, total: int | None = None, *, done: int = 0) -> Iterator[T]:
    """Iterate with a progress bar that shows elapsed time and ETA on stderr; lines when stderr is no terminal.

    `done` counts steps already finished by an earlier, interrupted run.
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with progress(label, total, done=done) as step:
        for item in items:
            yield item
            step(1)


class Advance(Protocol):
    """Says how much was done."""

    def __call__(self, amount: float, *, found: bool = False) -> None:
        """amount: steps, or a part of one · found: done by an earlier run, so that it tells nothing of the speed."""
        ...


@contextmanager
def progress(
    label: str, total: float | None, *, done: float = 0, clock: Callable[[], float] | None = None
) -> Iterator[Advance]:
    """A progress bar to tell what was done; when stderr is no terminal, a line every half minute.

    The ETA is the mean time of a step so far, parts of one among them, times what is left: there from the first part
    on.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not Shown.progress:
        yield lambda amount, found=False: None
        return
    if not console.is_terminal:  # no bar, which would leave a thread that draws nothing: a line now and then
        yield Lines(label, total, done, clock or monotonic)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    last = TextColumn("ETA {task.fields[eta]}")
    with Progress(*columns, last, console=console, transient=True, get_time=clock) as bar:
        task = bar.add_task(label, total=total, completed=done, eta="-:--:--")  # type: ignore[arg-type]
        before = done

        def step(amount: float, *, found: bool = False) -> None:
            nonlocal before
            before += amount if found else 0
            bar.advance(task, amount)
            now = bar.tasks[task]
            left = seconds_left(now.elapsed or 0.0, now.completed - before, (total or 0) - now.completed)
            bar.update(task, eta="-:--:--" if left is None else str(timedelta(seconds=round(left))))

        yield step


class Shown:
    """Whether this process shows progress, which a worker leaves to who hired it, and warns, which of several that do
    the same one does."""

    progress = True
    warnings = True


class Lines:
    """Progress as lines on stderr: nothing for what is done within half a minute."""

    def __init__(self, label: str, total: float | None, done: float, clock: Callable[[], float]) -> None:
        self.label, self.total, self.done, self.before, self.clock = label, total, done, done, clock
        self.start = self.said = clock()

    def __call__(self, amount: float, *, found: bool = False) -> None:
        """What was done since the last call."""
        self.done += amount
        self.before += amount if found else 0
        now = self.clock()
        if self.total is None or now - self.said < LINE_EVERY or self.done >= self.total:
            return
        self.said = now
        left = seconds_left(now - self.start, self.done - self.before, self.total - self.done)
        eta = "" if left is None else f", {timedelta(seconds=round(left))} left"
        done, total = (f"{value:,.1f}".removesuffix(".0") for value in (self.done, self.total))
        print(f"polybit: {self.label}: {done} of {total}{eta}", file=sys.stderr, flush=True)


def seconds_left(elapsed: float, done: float, left: float) -> float | None:
    """What is left at the mean speed so far; None before there is any."""
    return elapsed / done * max(left, 0.0) if done > 0 else None
