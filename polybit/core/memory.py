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
    limits += [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    limits += [number(Path("/sys/fs/cgroup/memory.max")), number(Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))]
    return min(limit for limit in limits if limit > 0)


def free_bytes() -> int:
    """Memory that can be had now without anything being pushed out."""
    found = most_bytes()
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                found = min(found, int(line.split()[1]) * 1024)
    return found


def allowed_bytes(gigabytes: float | None) -> int:
    """Bytes a run keeps to: as many as it was given, or half of what there may ever be."""
    return most_bytes() // 2 if gigabytes is None else int(gigabytes * 1e9)


def fits(size: int, gigabytes: float | None) -> bool:
    """Whether `size` bytes may be had at once: within what the run was given, else within what is free."""
    return size <= (FREE_SHARE * free_bytes() if gigabytes is None else gigabytes * 1e9)


def number(path: Path) -> int:
    """The number in a file of the system, -1 where there is none."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return -1
