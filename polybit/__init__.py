"""polybit: one language model, many precisions.

Importing this package loads nothing heavy; each public name is imported when it is first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "allocate": "polybit.library",
    "columns": "polybit.library",
    "frontier": "polybit.library",
    "mix": "polybit.library",
    "sweep": "polybit.library",
    "generate": "polybit.library",
    "chat": "polybit.library",
    "doctor": "polybit.library",
    "pairs": "polybit.library",
    "align": "polybit.library",
    "quantize": "polybit.library",
    "plan": "polybit.library",
    "bench": "polybit.library",
    "evaluate": "polybit.library",
    "report": "polybit.library",
    "judge": "polybit.library",
    "cost": "polybit.library",
    "attack": "polybit.library",
    "train": "polybit.library",
    "study": "polybit.library",
    "serve": "polybit.library",
    "route": "polybit.library",
    "export": "polybit.library",
    "Precision": "polybit.core.precision",
    "Plan": "polybit.core.plan",
    "PolybitError": "polybit.core.runtime",
    "use": "polybit.nn.switch",
    "at": "polybit.nn.switch",
    "random_precision": "polybit.nn.switch",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'polybit' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_PUBLIC[name]), name)


class PublicPackage(ModuleType):
    """This package. Some acts bear the name of the room they lead to (`train`, `report`): `polybit.train` is the act.

    Importing a file of the room would set that name to the room's module, so such settings are passed over; the room
    is imported as `from polybit.train import ...`, as ever.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = PublicPackage
