"""Called by torch when it is imported (entry point group torch.backends); must stay tiny and never raise."""

import importlib
import importlib.util
import sys
from contextlib import suppress
from typing import Any

WATCHED = "transformers.quantizers.auto"


class Finder:
    """Registers our quantizer as soon as transformers' table of quantizers has been imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Wrap the loader of that table; if it was half imported when torch came, act at the next import instead."""
        if name == WATCHED:
            sys.meta_path.remove(self)
            spec: Any = importlib.util.find_spec(name)
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                attach()

            spec.loader.exec_module = exec_module
            return spec
        if name.startswith("transformers.") and is_ready():
            sys.meta_path.remove(self)
            attach()
        return None


def is_ready() -> bool:
    """True when transformers' table of quantizers has been imported to its end."""
    module: Any = sys.modules.get(WATCHED)
    return hasattr(module, "register_quantizer") and not getattr(module.__spec__, "_initializing", False)


def attach() -> None:
    """Register; a failure must not break the import of transformers, loading a checkpoint will then fail loudly."""
    with suppress(Exception):
        importlib.import_module("polybit.hub.plugin")


def register() -> None:
    """Register now if transformers is there already, else when it comes."""
    with suppress(Exception):
        if is_ready():
            attach()
        else:
            sys.meta_path.insert(0, Finder())
