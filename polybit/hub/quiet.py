"""No progress bars and no tries of other libraries on the screen, but of a download that somebody may watch there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def quiet(name: str | Path = ".") -> Iterator[None]:
    """transformers draws no bars in the block, unless a model is fetched by its hub id with a terminal to see it."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    fetching = not Path(name).exists() and sys.stderr.isatty()
    if shown and not fetching:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown and not fetching:
            logging.enable_progress_bar()


@contextmanager
def untold_retries() -> Iterator[None]:
    """The hub's client tells of no try that failed in the block: the error at their end says it once."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
