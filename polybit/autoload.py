"""Called by torch when it is imported (entry point group torch.backends); must stay tiny and never raise."""

import importlib.util
import sys
from contextlib import suppress
from typing import Any

WATCHED = "transformers.quantizers.auto"


class Finder:
    """Registers our quantizer the moment transformers' table of quantizers has been imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Wrap the loader of one module; every other import passes by."""
        if name != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec: Any = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            attach()

        spec.loader.exec_module = exec_module
        return spec


def attach() -> None:
    """Register; a failure must not break the import of transformers, loading a checkpoint will then fail loudly."""
    with suppress(Exception):
        importlib.import_module("polybit.hub.plugin")


def register() -> None:
    """Register now if transformers is there already, else when it comes."""
    with suppress(Exception):
        if hasattr(sys.modules.get(WATCHED), "register_quantizer"):
            attach()
        elif WATCHED not in sys.modules:
            sys.meta_path.insert(0, Finder())
