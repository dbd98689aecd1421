"""Several processes that train one model: who they are, and what only the first of them does.

torchrun says who they are (RANK, WORLD_SIZE); a run of one process is a world of one, where all of this does nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from polybit.core.runtime import PolybitError, Shown
from polybit.hub.crew import check_gpus
from polybit.hub.directory import output_lock
from polybit.hub.models import device_of
from polybit.hub.workspace import Visit, Workspace

T = TypeVar("T")
PATIENCE = timedelta(hours=12)  # the first process may be asked to make pairs while the others wait


def size() -> int:
    """How many processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is."""
    return int(os.environ.get("RANK", "0"))


def first() -> bool:
    """Whether this is the one that writes."""
    return rank() == 0


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Inside, the processes that torchrun started know each other; all but the first are silent.

    device: as --device says; each process takes the GPU of its number
    Raises PolybitError where there are fewer GPUs than processes, or GPUs of unequal memory.
    """
    if size() == 1 or dist.is_initialized():
        yield
        return
    backend, memory = "gloo", None
    if device_of(device).type == "cuda":
        place = int(os.environ.get("LOCAL_RANK", "0"))
        if place >= torch.cuda.device_count():
            raise PolybitError(
                f"process {place + 1} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: "
                "start as many processes as GPUs, or give --device cpu"
            )
        torch.cuda.set_device(place)
        backend, memory = "nccl", torch.cuda.get_device_properties(place).total_memory
    dist.init_process_group(backend, timeout=PATIENCE)
    try:
        check_gpus({f"process {number}": bytes_ for number, bytes_ in enumerate(gathered(memory))})
        if not first():
            Shown.progress = Shown.warnings = False
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        yield
    finally:
        dist.destroy_process_group()


def held(out: Path) -> AbstractContextManager[None]:
    """The lock of an output, which the first process takes for all."""
    return output_lock(out) if first() else nullcontext()


def workspace(out: Path, fingerprint: Mapping[str, Any], *, restart: bool) -> Workspace | Visit:
    """The workspace of a run, opened by the first process and visited by the others."""
    store = Workspace(out, fingerprint, restart=restart) if first() else None
    wait()
    return store or Visit(out)


def wait() -> None:
    """Until all are here."""
    if size() > 1:
        dist.barrier()


def gathered(value: T) -> list[T]:
    """What each process has, in order."""
    if size() == 1:
        return [value]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found
