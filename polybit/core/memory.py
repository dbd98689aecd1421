"""Main memory: how much of it there is, and large pages, which a processor reads 15 to 25 % faster than small ones."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

PAGE = 4096
FREE_SHARE = 0.75  # of what is free that a model may take as a whole
SMALLEST = 1 << 20  # bytes; a smaller tensor hardly holds one large page
USE_LARGE, MAKE_LARGE = 14, 25  # MADV_HUGEPAGE, MADV_COLLAPSE of Linux
OWN_PAGES, TRIMMED = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of glibc
MOST_KEPT, MOST_UNUSED = 32 << 20, 1 << 30  # bytes: the largest piece glibc lets one keep, and what may lie unused
LARGE_SHARE = 64  # one part in so many of what a run may take is given back as soon as it is freed

SHELL_LIMITS = {resource.RLIMIT_AS: "VmSize:", resource.RLIMIT_DATA: "VmData:"}  # limit -> what counts against it
GROUPS = {2: "sys/fs/cgroup", 1: "sys/fs/cgroup/memory"}  # version of control groups -> where they are
LIMIT_FILES = {2: ("memory.max", "memory.high"), 1: ("memory.limit_in_bytes",)}
USED_FILES = {2: "memory.current", 1: "memory.usage_in_bytes"}
STATS = {2: ("",), 1: ("total_",)}  # how memory.stat spells numbers of a group and those below it


class Kept:
    """Bytes of the smallest piece that is given back at once."""

    pieces = SMALLEST


def collapse(tensor: Tensor) -> bool:
    """Put a tensor's memory on large pages now, in place; False where the system cannot (not Linux, a file, old)."""
    if not sys.platform.startswith("linux") or not tensor.is_cpu or not tensor.is_contiguous():
        return False
    if tensor.nbytes < SMALLEST:
        return False
    start = -(-tensor.data_ptr() // PAGE) * PAGE
    size = (tensor.data_ptr() + tensor.nbytes) // PAGE * PAGE - start
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise(start, size, USE_LARGE) == 0 and madvise(start, size, MAKE_LARGE) == 0


def return_freed() -> None:
    """Give the system back what was freed and the allocator keeps; glibc alone keeps any."""
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def return_large(allowed: int | None = None) -> None:
    """From now on, give the system back at once what was freed of a piece and more, and what lies free at the end.

    allowed: bytes the run keeps to; a piece is a part in LARGE_SHARE of them, 1 to 32 MB (default: as before). Glibc by
    itself keeps what is below 32 MB, and every block leaves more holes among them. Pieces of a megabyte are what takes
    least memory and most time: a model of 100 M weights took 1.5 times the CPU seconds of one in memory, by getting the
    same pages anew and clearing them, and 1.2 times with pieces of 8 or 32 MB.
    """
    if allowed is not None:
        Kept.pieces = min(MOST_KEPT, max(SMALLEST, allowed // LARGE_SHARE))
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(OWN_PAGES, Kept.pieces)


@contextmanager
def keeping_freed() -> Iterator[None]:
    """Inside, keep what is freed for what comes next, as the steps of training do again and again; `return_large`
    afterwards. A third of a step went into getting the same pages anew and clearing them; a tenth more memory is
    taken."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mallopt(OWN_PAGES, MOST_KEPT)
        mallopt(TRIMMED, MOST_UNUSED)
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(TRIMMED, SMALLEST)
        return_large()
        return_freed()


def most_bytes() -> int:
    """Memory this process may ever have: the machine's, or less where a container or a limit of the shell says so."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [resource.getrlimit(kind)[0] for kind in SHELL_LIMITS]
    limits += [limit for limit, _ in container_limits()]
    return min(limit for limit in limits if limit > 0)


def free_bytes() -> int:
    """Memory that can be had now without anything being pushed out."""
    found = [most_bytes()]
    available = named_numbers(Path("/proc/meminfo")).get("MemAvailable:")
    found += [] if available is None else [available * 1024]
    taken = named_numbers(Path("/proc/self/status"))
    for kind, name in SHELL_LIMITS.items():
        limit = resource.getrlimit(kind)[0]
        found += [limit - taken.get(name, 0) * 1024] if limit > 0 else []
    found += [limit - used for limit, used in container_limits()]
    return max(0, min(found))


def container_limits(root: Path = Path("/")) -> list[tuple[int, int]]:
    """(bytes allowed, bytes taken) of every control group this process is in that has a limit, those above it too.

    Pages of files count as free: they are given back when memory is asked for. root: the file system's.
    """
    lines = [line.split(":", 2) for line in text_of(root / "proc/self/cgroup").splitlines() if line.count(":") > 1]
    found = []
    for version, top in GROUPS.items():
        mine = "".join(
            path for _, names, path in lines if ("memory" in names.split(",") if version == 1 else not names)
        )
        path = Path(mine.lstrip("/"))  # a container may see its own as / or as one that is not there
        for folder in dict.fromkeys(root / top / part for part in (path, *path.parents, Path())):
            limits = [number(folder / name) for name in LIMIT_FILES[version]]
            used = number(folder / USED_FILES[version])
            stats = named_numbers(folder / "memory.stat")
            files = sum(
                stats.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive") for prefix in STATS[version]
            )
            found += [(limit, max(0, used - files)) for limit in limits if limit > 0]
    return found


def allowed_bytes(gigabytes: float | None) -> int:
    """Bytes a run keeps to: as many as it was given, or half of what there may ever be."""
    return most_bytes() // 2 if gigabytes is None else min(int(gigabytes * 1e9), most_bytes())


def fits(size: int, gigabytes: float | None) -> bool:
    """Whether `size` bytes may be had at once: within what is free, a share of it where the run was given nothing."""
    return size <= (FREE_SHARE * free_bytes() if gigabytes is None else min(gigabytes * 1e9, free_bytes()))


def named_numbers(path: Path) -> dict[str, int]:
    """First number behind each name of a file with a name a line."""
    rows = (line.split() for line in text_of(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def text_of(path: Path) -> str:
    """What a file of the system says, nothing where it cannot be read."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def number(path: Path) -> int:
    """The number in a file of the system, -1 where there is none."""
    said = text_of(path).strip()
    return int(said) if said.isdigit() else -1
