"""The door to the compiled CPU kernels: which instruction sets are there, and whether the library was built at all."""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType


@cache
def library() -> ModuleType | None:
    """The compiled extension, or None – said once, loudly – when the package was built without a compiler."""
    try:
        from polybit.kernels import _cpu  # type: ignore[attr-defined]
    except ImportError as error:
        warnings.warn(
            f"polybit runs without its compiled CPU kernels ({error}), many times slower: "
            "install a C++ compiler and reinstall polybit, or use a wheel",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return _cpu
