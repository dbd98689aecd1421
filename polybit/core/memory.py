"""Where weights lie in main memory: large pages, which a processor reads 15 to 25 % faster than small ones."""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor

PAGE = 4096
SMALLEST = 1 << 20  # bytes; a smaller tensor hardly holds one large page
USE_LARGE, MAKE_LARGE = 14, 25  # MADV_HUGEPAGE, MADV_COLLAPSE of Linux


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
