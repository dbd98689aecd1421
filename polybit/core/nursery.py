"""The process that workers of this machine are forked from: it has imported what they need, and computed nothing.

Torch and transformers take five seconds to import. This process begins while its parent imports them too, and every
worker of a run is a fork of it. Forking the parent itself would not do: it has run threads, which forks do not have.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any

FORKS = sys.platform == "linux"  # elsewhere the libraries of the system itself may not be forked
NEEDED = (
    "polybit.hub.processes",
    "polybit.hub.load",
    "polybit.hub.lm",
    "transformers.generation.utils",  # transformers imports it with the first model
    "transformers.models.llama.modeling_llama",  # what other decoders are written from
)


def warm(options: Any, *modules: str) -> None:
    """Let it begin, where these options ask for workers of this machine.

    options: a record with `workers` and `ray` · modules: what workers import beside NEEDED
    """
    if FORKS and options.workers > 1 and options.ray is None:
        begin(options.workers, *modules)


def begin(workers: int, *modules: str) -> None:
    """Let it begin; nothing happens where it is there already."""
    forkserver.set_forkserver_preload([*NEEDED, *modules])
    with environment({"OMP_NUM_THREADS": str(threads_each(workers))}):  # of numpy; torch's are set in each worker
        forkserver.ensure_running()


def threads_each(workers: int) -> int:
    """Threads of one of several workers, before torch can be asked."""
    told = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, (int(told) if told.isdecimal() else len(os.sched_getaffinity(0))) // workers)


@contextmanager
def environment(more: Mapping[str, str]) -> Iterator[None]:
    """While inside, processes that start get these variables."""
    before = {name: os.environ.get(name) for name in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
