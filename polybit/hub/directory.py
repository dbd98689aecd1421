"""A directory that appears whole or not at all: staging, atomic swap, lock, manifest, disk errors in words."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from polybit.core.records import RUN_FILE
from polybit.core.runtime import PolybitError, check_spelling, fsync_directory, nearest, sha256_file, write_json
from polybit.hub.files import read_json

MANIFEST = "manifest.json"
FREE = ("README.md", RUN_FILE, MANIFEST)  # files that may change without making the artefact another one
CUT_SHORT = re.compile(r"^\d+ requested and \d+ written|unexpected pos \d+ vs \d+")  # numpy's and torch's full disk
LONGEST_NAME = 200  # characters of a file's name, of which file systems spell 255 bytes
TEMPLATES = "additional_chat_templates"  # the one folder a tokenizer may write
ADAPTERS = "adapters"  # a folder per preset that has one
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# what transformers reads wherever it lies beside the weights: weights, adapters, tokenizers, templates, settings, code
HONOURED = re.compile(
    r".*\.(safetensors(\.index\.json)?|bin|py|model|tiktoken|jinja)|(config|generation_config|adapter_config|"
    r"added_tokens|special_tokens_map|chat_template|tokenizer.*|vocab|merges|preprocessor_config|processor_config|"
    rf"video_preprocessor_config)\.(json|txt|jsonl)|{TEMPLATES}(/.*)?"
)
HELD: dict[Path, int] = {}  # locks of this process, so that a run may hold its output while saving into it


@contextmanager
def output_lock(out: Path) -> Iterator[None]:
    """Hold the output path against other processes; the same process may hold it more than once."""
    out = absolute(out)
    if HELD.get(out):
        HELD[out] += 1
        try:
            yield
        finally:
            HELD[out] -= 1
        return
    path = out.with_name(f".{out.name}.lock")
    with disk_errors(out):
        handle = take_lock(path, out)
    HELD[out] = 1
    try:
        yield
    finally:
        HELD[out] = 0
        path.unlink(missing_ok=True)
        os.close(handle)


def take_lock(path: Path, out: Path) -> int:
    """Open and lock a file that nobody unlinks meanwhile; returns its descriptor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise PolybitError(f"another process is writing {out}: wait for it or choose another output path") from None
        if path.exists() and path.stat().st_ino == os.fstat(handle).st_ino:
            return handle
        os.close(handle)


@contextmanager
def staged_directory(
    out: Path, *, overwrite: bool = False, check: Callable[[Path], Any] | None = None
) -> Iterator[Path]:
    """Give an empty sibling directory to fill; at the end it is flushed, gets its manifest, and takes the name `out`.

    Killed at any moment, `out` is what it was before or the new directory, whole. An existing `out` is replaced only
    with `overwrite`, and only when it is an artefact of this package or empty. On failure nothing is left behind.
    check: what looks at the finished directory before it takes the name; what it raises is a failure.
    """
    out = absolute(out)
    with output_lock(out), disk_errors(out):
        restore(out)
        check_output(out, overwrite=overwrite)
        stage = staging(out)
        for leftover in (stage, replaced(out)):  # of a run that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            stage.mkdir()
            yield stage
            write_manifest(stage)
            for path in files_of(stage).values():  # safetensors makes files only their owner may read
                shutil.copymode(stage / MANIFEST, path)
            fsync_tree(stage)
            if check is not None:
                check(stage)
            publish(stage, out)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def staging(out: Path) -> Path:
    """Where the next version of `out` is prepared."""
    return out.with_name(f".{out.name}.staged")


def replaced(out: Path) -> Path:
    """Where the previous version waits on systems that cannot swap two names at once."""
    return out.with_name(f".{out.name}.replaced")


def absolute(path: Path) -> Path:
    """The path with links followed; a loop of links is refused, and a name that is no UTF-8."""
    check_spelling(path)
    try:
        return Path(path).expanduser().resolve(strict=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise PolybitError(f"the path {str(path)!r} cannot be followed ({error!s:.80}): choose another") from None


def check_output(out: Path, *, overwrite: bool = False) -> None:
    """Refuse an output path that cannot or must not be written."""
    out = absolute(out)
    there = nearest(out) == out
    if there and not out.is_dir():
        raise PolybitError(f"the output {out} is not a directory: choose a path for a new directory")
    if there and any(out.iterdir()):
        if not overwrite:
            raise PolybitError(f"the output {out} exists already: choose another path, or allow --overwrite")
        if not (out / MANIFEST).is_file():
            raise PolybitError(f"the output {out} holds other files, no polybit checkpoint: choose another path")
    parent = nearest(out.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise PolybitError(f"the output {out} cannot be written, {parent} is read-only or no directory: choose another")


def publish(stage: Path, out: Path) -> None:
    """Give `stage` the name `out` in one step; what was there before is at `stage` or gone."""
    if not out.exists() or not any(out.iterdir()):
        stage.rename(out)
    elif not exchange(stage, out):
        out.rename(replaced(out))
        stage.rename(out)
        shutil.rmtree(replaced(out), ignore_errors=True)
    fsync_directory(out.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically (Linux renameat2 with RENAME_EXCHANGE); False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), flag) == 0


def restore(out: Path) -> None:
    """Put back the previous version when a swap in two steps was interrupted between them."""
    if not out.exists() and replaced(out).is_dir():
        replaced(out).rename(out)


def fsync_tree(directory: Path) -> None:
    """Flush every file and directory to disk."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        elif path.is_dir():
            fsync_directory(path)
    fsync_directory(directory)


@contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Say in one sentence that the disk is full or the place is not writable."""
    try:
        yield
    except Exception as error:  # compiled libraries (safetensors, tokenizers) raise kinds of their own
        number = error.errno if isinstance(error, OSError) else None
        spelled = re.search(r"os error (\d+)", str(error))
        number = int(spelled[1]) if spelled else errno.ENOSPC if CUT_SHORT.search(str(error)) else number
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise PolybitError(
                f"the disk or quota is full while writing {out}: free some space and run again; "
                "the unfinished part was removed, what was there before is untouched"
            ) from error
        if number in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
            errno.ENOENT,
            errno.EEXIST,
            errno.ENAMETOOLONG,
        ):
            raise PolybitError(
                f"{out} cannot be written ({os.strerror(number)}): choose another output path"
            ) from error
        raise


def write_manifest(directory: Path) -> None:
    """Size and sha256 of every file, written last: a directory without it is unfinished."""
    files = {
        name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for name, path in files_of(directory).items()
        if name not in FREE
    }
    write_json(directory / MANIFEST, {"version": 1, "files": files})


def check_manifest(directory: Path) -> list[str]:
    """Compare every file with the manifest and name the first that is missing, cut, changed or extra; returns names."""
    if not (directory / MANIFEST).is_file():
        raise PolybitError(f"{directory} has no {MANIFEST}: the checkpoint is unfinished or damaged, make it again")
    files = read_json(directory / MANIFEST).get("files")
    if not isinstance(files, dict) or not files:
        raise PolybitError(f"{directory / MANIFEST} lists no files: it is damaged, make the checkpoint again")
    for name, entry in sorted(files.items()):
        check_file(directory, name, entry)
    extra = sorted(name for name in files_of(directory) if name not in files and HONOURED.fullmatch(name))
    if extra:
        raise PolybitError(
            f"{directory / extra[0]} is not part of the checkpoint, and transformers would read it: remove it, or save "
            "the checkpoint anew with it"
        )
    return list(files)


def files_of(directory: Path) -> dict[str, Path]:
    """The files of a checkpoint by the names of its manifest; folders but those of chat templates and of adapters are
    passed by."""
    found = {path.name: path for path in directory.iterdir() if not path.is_dir()}
    folder = directory / TEMPLATES
    inside = {f"{TEMPLATES}/{path.name}": path for path in folder.iterdir()} if folder.is_dir() else {}
    worn = {
        f"{ADAPTERS}/{path.parent.name}/{path.name}": path
        for name in ADAPTER_FILES
        for path in directory.glob(f"{ADAPTERS}/*/{name}")
    }
    return dict(sorted({**found, **inside, **worn}.items()))


def adapter_of(name: str) -> str | None:
    """The preset whose adapter a name in a manifest is part of, None for other files."""
    folder, preset, file = (*name.split("/"), "", "")[:3]
    known = folder == ADAPTERS and file in ADAPTER_FILES and name == f"{ADAPTERS}/{preset}/{file}"
    return preset if known and preset not in ("", ".", "..") else None


def check_file(directory: Path, name: str, entry: Any) -> None:
    """One line of the manifest against the file it speaks of."""
    path = directory / name
    if (
        (Path(name).name != name.removeprefix(f"{TEMPLATES}/") and adapter_of(name) is None)
        or len(name) > LONGEST_NAME
        or not isinstance(entry, dict)
        or set(entry) != {"bytes", "sha256"}
    ):
        raise PolybitError(f"{directory / MANIFEST} has a malformed entry {name!r:.80}: make the checkpoint again")
    if not path.is_file():
        raise PolybitError(f"{path} is missing, though the manifest lists it: fetch or make the checkpoint again")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise PolybitError(
            f"{path} has {size} bytes instead of {entry['bytes']!r:.40}: it is incomplete, fetch it again"
        )
    if sha256_file(path) != entry["sha256"]:
        raise PolybitError(
            f"{path} differs from its sha256 in the manifest: it is damaged or was edited, fetch it again"
        )
