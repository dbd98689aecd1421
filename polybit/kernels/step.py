"""The door to the compiled parts of a decoding step that are no products: norm, attention of one token, gate."""

from __future__ import annotations

from functools import cache
from types import ModuleType

from polybit.kernels.extensions import extension


@cache
def library() -> ModuleType | None:
    """The compiled extension, or None where the package was built without a compiler."""
    return extension("_step")
