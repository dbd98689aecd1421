"""Who does the parts of an evaluation: both models in this process, or workers that hold both.

    share = Here(reference, quantized)            # or Readers(team) of workers that are a PairWorker
    for result in share(said, parts, "answers"):  # said(reference, quantized, *part), in the order of the parts
        ...

A part is what one process would do at once (the same batches), so that the numbers do not depend on who does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from polybit.core.runtime import track
from polybit.hub.lm import LocalLM
from polybit.hub.workers import Team

T = TypeVar("T")
ITEMS = 256  # of a suite that are a part: read together, whoever reads them
Part = tuple[Any, ...]
Reader = Callable[..., Any]  # (reference, quantized, *part) -> what was read; a function of a module


class Share(Protocol):
    """pieces: into how many parts work that can be cut anywhere is cut at least."""

    pieces: int

    def __call__(self, read: Reader, parts: Sequence[Part], label: str | None = None) -> Iterator[Any]:
        """The results of all parts in their order; label: of the progress, where what reads shows none itself."""
        ...


class Here:
    """Both models in this process (of a span head, its reader twice)."""

    pieces = 1

    def __init__(self, reference: Any, quantized: Any) -> None:
        self.reference, self.quantized = reference, quantized

    def __call__(self, read: Reader, parts: Sequence[Part], label: str | None = None) -> Iterator[Any]:
        """One after another; each shows its own progress."""
        for part in parts:
            yield read(self.reference, self.quantized, *part)


class Readers:
    """Workers that hold both models."""

    def __init__(self, team: Team, pieces: int) -> None:
        self.team, self.pieces = team, pieces

    def __call__(self, read: Reader, parts: Sequence[Part], label: str | None = None) -> Iterator[Any]:
        """As they come, in order."""
        early: dict[int, Any] = {}
        awaited = 0
        done = self.team.map([(read, part) for part in parts])
        for number, result in done if label is None else track(done, label, len(parts)):
            early[number] = result
            while awaited in early:
                yield early.pop(awaited)
                awaited += 1


class PairWorker:
    """A worker with both models; `opened(*arguments)` gives them."""

    def __init__(self, opened: Callable[..., tuple[Any, Any]], *arguments: Any) -> None:
        self.both = opened(*arguments)

    def __call__(self, task: tuple[Reader, Part]) -> Any:
        """One part."""
        read, part = task
        return read(*self.both, *part)


def cut(items: Sequence[T], size: int = ITEMS) -> list[Sequence[T]]:
    """Items of a suite in parts."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def joined(results: Iterable[Sequence[T]], pieces: int) -> list[list[T]]:
    """The inverse of `cut`, of results that follow each other: every so many pieces are one."""
    found = list(results)
    rows = [found[start : start + pieces] for start in range(0, len(found), pieces)]
    return [[one for piece in row for one in piece] for row in rows]


def said(
    reference: LocalLM,
    quantized: LocalLM,
    of_reference: bool,
    preset: str | None,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    label: str,
) -> list[list[int]]:
    """Greedy answers of one of the models, the quantized one at a preset."""
    lm = reference if of_reference else quantized
    with lm.at(None if of_reference else preset):
        return lm.generate_tokens(prompts, max_tokens=max_tokens, label=label)
