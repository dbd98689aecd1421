"""Workers that are processes of this machine and share its threads and GPUs."""

from __future__ import annotations

import os
import pickle
import signal
from contextlib import suppress
from io import BytesIO
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from polybit.core.nursery import FORKS, begin, environment
from polybit.core.runtime import PolybitError
from polybit.hub.crew import Make, Seen, Word, greet, portable, ready


class Processes:
    """A process per worker, at the other end of a pipe; see hub.crew.Crew.

    They are forks of core.nursery's process where that is possible. Bytes go through the pipe and not through shared
    memory, of which containers have little.
    """

    def __init__(self, make: Make, arguments: tuple[Any, ...], workers: int, seen: Seen) -> None:
        self.told = packed((make, arguments, seen))
        self.threads = max(1, torch.get_num_threads() // workers)
        # a GPU cannot be handed to a fork of a process whose libraries have looked at it
        forks = FORKS and not torch.cuda.device_count()
        if forks:
            begin(workers)
        self.context: Any = get_context("forkserver" if forks else "spawn")
        self.people: dict[int, tuple[Any, Connection]] = {}
        self.number = 0

    def hire(self) -> int:
        """A process that starts."""
        ours, theirs = self.context.Pipe()
        worker, self.number = self.number, self.number + 1
        process = self.context.Process(target=serve, args=(theirs, self.threads), daemon=True)
        with environment({"OMP_NUM_THREADS": str(self.threads), **gpu_of(worker)}):
            try:
                process.start()
            except (EOFError, OSError) as error:  # the process they are forked from is gone, or none can be made
                raise PolybitError(
                    f"no worker can be started ({type(error).__name__}: {error}): free some memory, or leave --workers "
                    "out"
                ) from error
        theirs.close()
        self.people[worker] = process, ours
        with suppress(OSError):  # it is dead already, which is heard
            ours.send_bytes(self.told)
        return worker

    def give(self, worker: int, task: Any) -> None:
        """A worker that has died since is heard to be gone."""
        with suppress(OSError):
            self.people[worker][1].send_bytes(packed(task))

    def hear(self, seconds: float) -> list[Word]:
        """Of everybody who has something to say or has died."""
        pipes = {pipe: worker for worker, (_, pipe) in self.people.items()}
        found = wait(list(pipes), seconds)
        return [self.word(pipes[pipe], pipe) for pipe in found if isinstance(pipe, Connection)]

    def word(self, worker: int, pipe: Connection) -> Word:
        """What stands in a pipe; its end is the end of its worker."""
        try:
            kind, what = pickle.loads(pipe.recv_bytes())
            return Word(worker, kind, what)
        except (EOFError, OSError):
            process, _ = self.people.pop(worker)
            process.join()
            pipe.close()
            return Word(worker, "gone", how_it_ended(process.exitcode))

    def end(self) -> None:
        """All at once; nobody is waited for to finish a task."""
        for process, pipe in self.people.values():
            process.kill()
            pipe.close()
        for process, _ in self.people.values():
            process.join()
        self.people = {}


class Packer(pickle.Pickler):
    """Sends of a tensor what it holds, not all that it is a view of."""

    def reducer_override(self, value: Any) -> Any:
        """What a tensor is made of again; everything else as usual."""
        if type(value) is torch.Tensor and value.untyped_storage().nbytes() > value.numel() * value.element_size():
            return value.clone().__reduce_ex__(5)
        return NotImplemented


def packed(value: Any) -> bytes:
    """As it goes through a pipe."""
    buffer = BytesIO()
    Packer(buffer, protocol=5).dump(value)
    return buffer.getvalue()


def how_it_ended(code: int | None) -> str:
    """An exit status in words."""
    if code == -signal.SIGKILL:
        return "was killed (signal 9, as the system does where memory is short)"
    if code is not None and code < 0:
        return f"was ended by signal {-code}"
    return f"ended with status {code}"


def gpu_of(worker: int) -> dict[str, str]:
    """One GPU for each worker, in turns; nothing where there is none."""
    count = torch.cuda.device_count()
    if not count:
        return {}
    there = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return {"CUDA_VISIBLE_DEVICES": there.split(",")[worker % count]}


def serve(pipe: Connection, threads: int) -> None:
    """The life of a worker: it greets, builds what it works with at the first task, and ends with the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that hired us
    ready(threads)
    try:
        make, arguments, seen = pickle.loads(pipe.recv_bytes())
        pipe.send_bytes(packed(("here", greet(seen))))
        work = None
        while True:
            task = pickle.loads(pipe.recv_bytes())
            try:
                work = work or make(*arguments)
                answer = packed(("done", work(task)))
            except BaseException as error:
                answer = packed(("failed", portable(error)))
            pipe.send_bytes(answer)
    except (EOFError, OSError):  # who hired us is gone
        return
