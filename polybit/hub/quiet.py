"""No progress bars of other libraries, but of a download that somebody may watch on a terminal."""

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
