"""Checks that several records share, and a record as plain values."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from polybit.core.runtime import PolybitError, check_spelling, nearest, staged_name
from polybit.data.table import EMBEDDED

Device = Literal["auto", "cpu", "cuda"]
LARGEST_SEED = 1 << 63
LONGEST_NAME = 255  # bytes, of a file on every file system of today


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Who shares the work of a verb; changes no number and no byte of what it makes."""

    workers: int = 1
    """Workers to share the work: processes of this machine, each with the model, or with --ray of a cluster."""
    ray: str | None = None
    """Ray cluster whose workers share the work: its address as in 10.0.0.5:6379, auto = the one this machine belongs
    to, local = a new one on this machine. Models and outputs lie at the same path on all machines."""

    def __post_init__(self) -> None:
        at_least(self, workers=1)


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """How many processes train one model."""

    processes: int = 1
    """Processes of this machine that train together, each with its share of weights, gradients and moments (FSDP2); a
    GPU each where there are some. On several machines: torchrun ... -m polybit, without this."""

    def __post_init__(self) -> None:
        at_least(self, processes=1)


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """How an OpenAI-compatible endpoint is asked."""

    endpoint: str | None = None
    """Address of an OpenAI-compatible endpoint, as in http://localhost:8000/v1."""
    key_from: str = "OPENAI_API_KEY"
    """Environment variable that holds the endpoint's key; a local one needs none."""
    timeout: float = 120.0
    """Seconds to wait for one reply."""
    retries: int = 4
    """Further attempts at one reply."""
    concurrency: int = 4
    """Requests at a time."""

    def __post_init__(self) -> None:
        at_least(self, retries=0, concurrency=1)
        if not self.timeout > 0:
            raise PolybitError(f"--timeout {self.timeout:g} is not possible: give more than 0 seconds")


def at_least(options: Any, **least: int) -> None:
    """Refuse numbers below what is possible, and such a seed; None = the default is meant."""
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise PolybitError(f"--{name.replace('_', '-')} {value} is not possible: give {smallest} or more")
    check_seed("--seed", getattr(options, "seed", 0))


def check_seed(flag: str, seed: int | None) -> None:
    """Refuse a seed that a generator of torch or numpy does not take; None = the default is meant."""
    if seed is not None and not 0 <= seed < LARGEST_SEED:
        raise PolybitError(f"{flag} {seed} is not possible: give a number from 0 to {LARGEST_SEED - 1}")


def possible_memory(gigabytes: float | None) -> None:
    """Refuse a --memory that no machine has."""
    if gigabytes is not None and not 0 < gigabytes < 1e6:
        raise PolybitError(f"--memory {gigabytes} is not possible: give gigabytes, such as 4")


def file_can_be_written(flag: str, path: Path | None) -> None:
    """Refuse a file that cannot be written before the work is done that it is to keep."""
    if path is None:
        return
    path = Path(path)  # the library takes text as well
    if nearest(path) == path.absolute() and path.is_dir():
        raise PolybitError(f"{flag} {path} is a directory: give the name of a file")
    if len(os.fsencode(staged_name(path.name))) > LONGEST_NAME:
        raise PolybitError(f"{flag} {path.name[:40]}... cannot be written, the name is too long: give a shorter one")
    folder_can_be_written(flag, path.parent, named=path)


def folder_can_be_written(flag: str, path: Path, *, named: Path | None = None) -> None:
    """The same of a folder into which files go; named: what the flag names, if not the folder."""
    check_spelling(named or path)
    folder = nearest(path)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise PolybitError(
            f"{flag} {named or path} cannot be written, {folder} is read-only or no directory: choose another"
        )


def plain(options: Any) -> dict[str, Any]:
    """The fields of a record as JSON knows them: paths as text."""
    found = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in found.items()}


def names_of(listing: str | None) -> list[str]:
    """`a, b` as ["a", "b"]; nothing for None or an empty text."""
    return [name.strip() for name in (listing or "").split(",") if name.strip()]


def seeds_of(listing: str) -> list[int]:
    """`0,1,2` as numbers, each once."""
    try:
        found = list(dict.fromkeys(int(seed) for seed in listing.split(",")))
    except ValueError:
        raise PolybitError(f"--seeds {listing!r:.80} cannot be read: give numbers with commas, as in 0,1,2") from None
    for seed in found:
        check_seed("--seeds", seed)
    return found


def squad_is_there(flag: str, source: str) -> None:
    """Refuse a file of questions that does not exist."""
    if source != EMBEDDED and not Path(source).is_file():
        raise PolybitError(
            f"{flag} {source}: there is no such file; give a SQuAD .json, or 'embedded' for the reading task"
        )
