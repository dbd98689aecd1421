"""The same work spread over several processes, or over a Ray cluster: the one door to ray."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from polybit.core.runtime import PolybitError

Work = Callable[[Any], Any]
Make = Callable[..., Work]  # builds the worker of one process: a model is loaded once there
HERE: dict[str, Work] = {}  # the worker of this process


def spread(
    make: Make, arguments: tuple[Any, ...], tasks: Sequence[Any], *, workers: int = 1, ray: bool = False
) -> Iterator[Any]:
    """The results of `make(*arguments)(task)` for every task, in the order they are done.

    workers = 1 works in this process. More start fresh processes that share the machine's threads; with `ray` they are
    actors of the Ray cluster this machine belongs to (or of a new one on this machine). make, arguments, tasks and
    results must be picklable. Raises PolybitError when ray is asked for and not installed.
    """
    if workers < 1:
        raise PolybitError(f"--workers {workers} is not possible: give 1 or more")
    if ray:
        yield from spread_ray(make, arguments, tasks, workers)
    elif workers == 1 or len(tasks) < 2:
        work = make(*arguments)
        yield from map(work, tasks)
    else:
        yield from spread_processes(make, arguments, tasks, min(workers, len(tasks)))


def spread_processes(make: Make, arguments: tuple[Any, ...], tasks: Sequence[Any], workers: int) -> Iterator[Any]:
    """Fresh processes; leaving the iteration early, as Ctrl-C does, ends them."""
    import multiprocessing

    threads = max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context("spawn")  # forking a process that has run torch threads can hang
    with context.Pool(workers, initializer=settle, initargs=(make, arguments, threads)) as pool:
        yield from pool.imap_unordered(work_here, tasks)


def settle(make: Make, arguments: tuple[Any, ...], threads: int) -> None:
    """Build the worker of a new process."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    HERE["make"] = lambda _: make(*arguments)


def work_here(task: Any) -> Any:
    """One task in a worker process; the worker is built at the first, so that its errors reach the caller."""
    if "work" not in HERE:
        HERE["work"] = HERE["make"](None)
    return HERE["work"](task)


def spread_ray(make: Make, arguments: tuple[Any, ...], tasks: Sequence[Any], workers: int) -> Iterator[Any]:
    """Actors of a Ray cluster."""
    try:
        import ray
        from ray.util import ActorPool
    except ImportError as error:
        raise PolybitError(
            "spreading work over a cluster needs ray, which is not installed: run pip install 'polybit[cluster]', or "
            "use --workers alone for processes on this machine"
        ) from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)

    class Worker:
        """One actor."""

        def __init__(self) -> None:
            self.work = make(*arguments)

        def do(self, task: Any) -> Any:
            """One task."""
            return self.work(task)

    actor = ray.remote(Worker)
    pool = ActorPool([actor.remote() for _ in range(min(workers, max(1, len(tasks))))])
    yield from pool.map_unordered(lambda worker, task: worker.do.remote(task), tasks)
