"""The same work spread over several workers, processes of this machine or actors of a Ray cluster, by one contract.

    for number, result in spread(make, arguments, tasks, where=Where(4)):           # processes
        ...
    with Team(make, arguments, Where(64, ray="auto")) as team:                      # workers that stay for more tasks
        first = team.in_order(tasks)
        second = team.in_order(others)

A worker is told `make` and `arguments` once and calls `make(*arguments)` at its first task: what it needs comes by
path, and tasks are small. Whoever dies is replaced, and the task it had in hand goes to another; a task that kills its
worker twice ends the run. Results are those of one process with as many threads as a worker has.
"""

from __future__ import annotations

import uuid
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polybit.core.runtime import PolybitError, track, warn
from polybit.hub.crew import Crew, Greeting, Make, Seen, Work, check_greetings, listing

LIVES = 2  # workers a task may cost
LOSSES = 8  # workers it may cost when their nodes are to blame
PATIENCE = 300.0  # seconds in which the first worker must have started


@dataclass(frozen=True, slots=True)
class Where:
    """Who does the work; changes nothing about the result.

    workers: how many at most · ray: None = processes of this machine; an address of a Ray cluster, "auto" = the one
    this machine belongs to, "local" = a new one on this machine
    """

    workers: int = 1
    ray: str | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise PolybitError(f"--workers {self.workers} is not possible: give 1 or more")

    @property
    def alone(self) -> bool:
        """Whether this process does it."""
        return self.workers == 1 and self.ray is None

    @property
    def models(self) -> int:
        """How many copies of a model are on this machine: that of this process, and those of workers that are here."""
        return 1 + self.workers if self.ray in (None, "local") and not self.alone else 1


ALONE = Where()


def spread(
    make: Make,
    arguments: tuple[Any, ...],
    tasks: Sequence[Any],
    *,
    where: Where,
    here: Work | None = None,
    shared: Path | None = None,
    models: Sequence[str] = (),
) -> Iterator[tuple[int, Any]]:
    """(number of the task, its result) for every task, in the order they are done; see Team."""
    with Team(make, arguments, where, here=here, shared=shared, models=models) as team:
        yield from team.map(tasks)


class Team:
    """Workers that are hired with the first tasks and stay until the end of the `with`.

    make, arguments, tasks and results must be picklable. here: does the work in this process where there is one worker
    (default: make(*arguments)) · shared: a folder that workers write to or read from, which must be the same for all ·
    models: local paths that workers load.

    Raises PolybitError for workers that cannot start, are of another version, or do not see what they should, and for a
    task that killed its worker twice; an error of a task reaches the caller as it is.
    """

    def __init__(
        self,
        make: Make,
        arguments: tuple[Any, ...],
        where: Where,
        *,
        here: Work | None = None,
        shared: Path | None = None,
        models: Sequence[str] = (),
    ) -> None:
        self.make, self.arguments, self.where, self.here = make, arguments, where, here
        self.shared, self.models = shared, models
        self.crew: Crew | None = None
        self.token: Path | None = None
        self.hired: set[int] = set()
        self.free: list[int] = []
        self.greeted: list[Greeting] = []
        self.lost_at_start = 0

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Let all workers go."""
        if self.crew is not None:
            self.crew.end()
        if self.token is not None:
            self.token.unlink(missing_ok=True)
        self.crew, self.token, self.hired, self.free, self.greeted = None, None, set(), [], []

    def in_order(self, tasks: Sequence[Any], *, label: str | None = None) -> list[Any]:
        """The results of all tasks in the order of the tasks.

        label: of the progress that is shown (default: none is)
        """
        done = self.map(tasks)
        found = dict(done if label is None else track(done, label, len(tasks)))
        return [found[number] for number in range(len(tasks))]

    def map(self, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """(number of the task, its result), in the order they are done."""
        if self.where.alone or (len(tasks) < 2 and self.crew is None and self.where.ray is None):
            for number, task in enumerate(tasks):
                self.here = self.here or self.make(*self.arguments)
                yield number, self.here(task)
            return
        crew = self.crew = self.crew or self.open()
        complete = False
        try:
            yield from self.shared_out(crew, tasks)
            complete = True
        finally:
            if not complete:  # what is still in hand would be heard by the next tasks
                self.end()

    def shared_out(self, crew: Crew, tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """The loop: give what waits to who is free, hear, and make good what is lost."""
        waiting, in_hand, lives = deque(range(len(tasks))), dict[int, int](), Counter[int]()

        def give() -> None:
            while waiting and self.free:
                worker, number = self.free.pop(), waiting.popleft()
                in_hand[worker] = number
                crew.give(worker, tasks[number])

        while waiting or in_hand:
            give()
            while len(self.hired) < min(self.where.workers, len(waiting) + len(in_hand)):
                self.hired.add(crew.hire())
            words = crew.hear(PATIENCE)
            if not words and not in_hand:
                raise PolybitError(
                    f"no worker started in {PATIENCE:.0f} s: {self.kind} has no room for one; give fewer --workers, or "
                    "start more nodes"
                )
            for worker, kind, what, blame in words:
                if kind == "here":
                    self.greeted = check_greetings([*self.greeted, what])
                    self.free.append(worker)
                elif kind == "failed":
                    raise what
                elif kind == "gone":
                    self.hired.discard(worker)
                    self.lose(worker, in_hand.pop(worker, None), waiting, lives, tasks, what, blame=blame)
                else:
                    number = in_hand.pop(worker)
                    self.free.append(worker)
                    give()  # before the caller does what it does with the result
                    yield number, what

    def lose(
        self,
        worker: int,
        number: int | None,
        waiting: deque[int],
        lives: Counter[int],
        tasks: Sequence[Any],
        why: str,
        *,
        blame: bool,
    ) -> None:
        """A worker is gone: what it had in hand is next, unless it has cost enough."""
        self.free = [other for other in self.free if other != worker]
        if number is None:
            self.lost_at_start += 1
            if self.lost_at_start > 2 * self.where.workers:
                raise PolybitError(f"workers of {self.kind} do not start: the last one {why}")
            return
        lives[number] += LOSSES // LIVES if blame else 1
        if lives[number] >= LOSSES:
            raise PolybitError(
                f"task {number + 1} of {len(tasks)} ({named(tasks[number])}) ended its worker again and again, the "
                f"last one {why}: give fewer --workers or more memory, what is finished is kept"
            )
        waiting.appendleft(number)
        warn(f"a worker {why}; task {number + 1} of {len(tasks)} is done again")

    @property
    def kind(self) -> str:
        """What the workers are of, for a sentence."""
        return "this machine" if self.where.ray is None else f"the Ray cluster at {self.where.ray}"

    def open(self) -> Crew:
        """The crew, and the token every worker must find."""
        if self.shared is not None and self.where.ray is not None:
            self.shared.mkdir(parents=True, exist_ok=True)
            self.token = self.shared / f".seen-{uuid.uuid4().hex}"
            self.token.write_text(uuid.uuid4().hex, encoding="utf-8")
        seen = Seen(
            {path: listing(path) for path in self.models if Path(path).exists()},
            None if self.token is None else (str(self.token.absolute()), self.token.read_text(encoding="utf-8")),
        )
        if self.where.ray is None:
            from polybit.hub.processes import Processes

            return Processes(self.make, self.arguments, self.where.workers, seen)
        from polybit.hub.cluster import Actors

        return Actors(self.make, self.arguments, self.where.workers, self.where.ray, seen)


def named(task: Any) -> str:
    """A task in a few words."""
    text = " ".join(repr(task).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
