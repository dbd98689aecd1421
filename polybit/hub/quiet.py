"""No progress bars and no tries of other libraries on the screen, but of a download that somebody may watch there."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

UNTOLD = (  # what transformers tells on the way and no user of polybit can act on
    "mtime may not be reliable",  # checkpoints written within a second are ordered by their numbers, which is right
    "`past_key_values`/`cache_params` are deprecated",  # the name older versions know, which are supported too
)


def told(record: logging.LogRecord) -> bool:
    """Whether a record of transformers' log is shown."""
    return not any(part in record.getMessage() for part in UNTOLD)


@contextmanager
def quiet(name: str | Path = ".") -> Iterator[None]:
    """transformers draws no bars in the block, unless a model is fetched by its hub id with a terminal to see it."""
    from transformers.utils import logging as library

    for handler in logging.getLogger("transformers").handlers:
        if told not in handler.filters:
            handler.addFilter(told)
    shown = library.is_progress_bar_enabled()
    fetching = not Path(name).exists() and sys.stderr.isatty()
    if shown and not fetching:
        library.disable_progress_bar()
    try:
        yield
    finally:
        if shown and not fetching:
            library.enable_progress_bar()


@contextmanager
def calling_hub(name: str | Path) -> Iterator[None]:
    """In the block the hub's client tells of no try that failed, since the error at their end says it once.

    For a model that is no directory here it makes none at all where the hub cannot be reached: what is in its cache is
    taken. Five tries with growing pauses took half a minute to say that a name is mistyped.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import logging as library

    level, offline = library.get_verbosity(), constants.HF_HUB_OFFLINE
    library.set_verbosity_error()
    constants.HF_HUB_OFFLINE = offline or not (Path(name).exists() or reachable(constants.ENDPOINT))
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        library.set_verbosity(level)


def reachable(address: str) -> bool:
    """Whether a server of that https or http address takes a connection; behind a proxy that is left to the client."""
    server = urlsplit(address)
    if server.scheme in getproxies() or server.hostname is None:
        return True
    try:
        socket.create_connection((server.hostname, server.port or (443 if server.scheme == "https" else 80)), 3).close()
    except OSError:
        return False
    return True
