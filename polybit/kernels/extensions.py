"""The compiled parts of the package; where one is missing, that is said once, whichever was asked for first."""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from types import ModuleType


def extension(name: str, version: int | None = None) -> ModuleType | None:
    """The compiled module polybit.kernels.NAME; None, and said so, when it was not built or is of another version."""
    try:
        module = import_module(f"polybit.kernels.{name}")
        if version is not None and getattr(module, "version", 1) != version:
            raise ImportError(f"{name} was built from other sources than these")
    except ImportError as error:
        say(str(error))
        return None
    return module


@cache
def missing() -> list[str]:
    """What has been said in this process."""
    return []


def say(reason: str) -> None:
    """Warn, unless it was done."""
    if not missing():
        missing().append(reason)
        warnings.warn(
            f"polybit runs without its compiled kernels ({reason}), many times slower: "
            "install a C++ compiler and reinstall polybit, or use a wheel",
            RuntimeWarning,
            stacklevel=4,
        )
