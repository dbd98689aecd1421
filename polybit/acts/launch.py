"""An act of several processes: torchrun's agent starts them on this machine, each does the act, the first tells.

Processes that torchrun started already, on one machine or many, are those of the act; nothing is started then.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from polybit.core.parts import load
from polybit.core.records import Run
from polybit.core.runtime import PolybitError
from polybit.train import world

FAILED = 2  # exit status of a process that said why
TRACEBACKS = (  # who else says that a process ended, in tracebacks, before we say why
    "torch.distributed.elastic.multiprocessing.api",
    "torch.multiprocessing.spawn",
)


def by_processes(path: str, model: str, options: Any, act: Callable[[str, Any], Run]) -> Run:
    """What `act` gives, done by `options.processes` processes; path: where the act as a whole is found by its name."""
    asked, there = options.processes, world.size()
    if there == 1 and asked > 1:
        return started(path, model, options)
    if asked not in (1, there):
        raise PolybitError(f"--processes {asked}, and torchrun started {there}: leave --processes out under torchrun")
    with world.joined(options.device):
        return act(model, options)


def started(path: str, model: str, options: Any) -> Run:
    """Start the processes and wait; what the first one found."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=options.processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        max_restarts=0,
        monitor_interval=0.2,
    )
    threads = max(1, torch.get_num_threads() // options.processes)
    for name in TRACEBACKS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with TemporaryDirectory() as folder:
        try:
            return elastic_launch(config, one_process)(path, model, options, folder, threads)[0]
        except ChildFailedError as error:
            said = [file.read_text(encoding="utf-8") for file in sorted(Path(folder).iterdir())]
            number, failure = next(iter(error.failures.items()))
            raise PolybitError(
                said[0]
                if said
                else f"process {number} of {options.processes} ended with status {failure.exitcode} (-9: killed, as "
                "the system does where memory is short); what is finished is kept, run the command again"
            ) from error
        except SignalException as error:
            raise KeyboardInterrupt from error


def one_process(path: str, model: str, options: Any, folder: str, threads: int) -> Run:
    """The act in one of the processes; what a user can mend is left as a sentence for who started it."""
    torch.set_num_threads(threads)
    try:
        return load(path)(model, options)
    except PolybitError as error:
        (Path(folder) / f"{world.rank():05d}").write_text(str(error), encoding="utf-8")
        os._exit(FAILED)  # the others may wait for this one, and are ended by who started them
