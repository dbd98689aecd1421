"""What hub.workers and its kinds of workers say to each other: words, greetings, and what must be alike everywhere."""

from __future__ import annotations

import platform
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch

import polybit
from polybit.core.runtime import PolybitError, Shown, lacks_memory

Work = Callable[[Any], Any]
Make = Callable[..., Work]  # builds what a worker works with: a model is loaded once there
UNEQUAL = 1.1  # times the memory of another worker's GPU


class Word(NamedTuple):
    """What is heard of a worker: it is here (its Greeting), a task is done (the result) or failed (the error), or the
    worker is gone (why; `blame`: whether its task may be the reason)."""

    worker: int
    kind: Literal["here", "done", "failed", "gone"]
    what: Any
    blame: bool = True


class Crew(Protocol):
    """Workers of one kind, by number."""

    def hire(self) -> int:
        """Begin a worker, which says when it is here."""
        ...

    def give(self, worker: int, task: Any) -> None:
        """Hand a task to a worker that is here and idle."""
        ...

    def hear(self, seconds: float) -> list[Word]:
        """What workers say; nothing when the time is over."""
        ...

    def end(self) -> None:
        """Let all go, whatever they do."""
        ...


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a worker says when it starts: where it is, its versions, the bytes of its GPU, and what it cannot see."""

    host: str
    versions: Mapping[str, str]
    gpu_bytes: int | None = None
    unseen: str | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """What every worker must find on its disk as this process does.

    models: path -> names and sizes of its files · token: a file in a folder that is shared, and what it holds
    """

    models: Mapping[str, tuple[tuple[str, int], ...]]
    token: tuple[str, str] | None = None


def listing(path: str) -> tuple[tuple[str, int], ...]:
    """Names and sizes of the files of a directory, or of a file itself."""
    root = Path(path)
    files = [root] if root.is_file() else [file for file in root.iterdir() if file.is_file()]
    return tuple(sorted((file.name, file.stat().st_size) for file in files if not file.name.startswith(".")))


def versions() -> dict[str, str]:
    """What must be equal for equal numbers; Python's and torch's patch releases may differ."""
    release = lambda text: ".".join(text.partition("+")[0].split(".")[:2])  # noqa: E731
    return {
        "polybit": polybit.__version__,
        "torch": release(torch.__version__),
        "python": release(platform.python_version()),
    }


def greet(seen: Seen) -> Greeting:
    """Called in a worker that starts."""
    gpu = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return Greeting(socket.gethostname(), versions(), gpu, unseen(seen))


def unseen(seen: Seen) -> str | None:
    """What is not here as it should be, None when all is."""
    if seen.token is not None:
        path, text = Path(seen.token[0]), seen.token[1]
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            return str(path.parent)
    for name, files in seen.models.items():
        if not Path(name).exists() or listing(name) != files:
            return name
    return None


def check_greetings(greeted: Sequence[Greeting]) -> list[Greeting]:
    """Refuse a new worker, the last one, that would give other numbers or work on other files."""
    new, ours = greeted[-1], versions()
    for name, version in ours.items():
        if (found := new.versions.get(name)) != version:
            raise PolybitError(
                f"the worker on {new.host} has {name} {found or 'of an older kind'}, and this process {version}: "
                "install the same version on all machines"
            )
    if new.unseen is not None:
        raise PolybitError(
            f"the worker on {new.host} does not see {new.unseen} as this machine does: put it on a file system that "
            "all machines share, at the same path"
        )
    check_gpus({f"{one.host} (worker {number + 1})": one.gpu_bytes for number, one in enumerate(greeted)})
    return list(greeted)


def check_gpus(memory: Mapping[str, int | None]) -> None:
    """Refuse GPUs of unequal memory: batches, and so rounding, follow the memory of each.

    memory: who -> bytes of its GPU, None for none
    """
    sizes = {who: size or 0 for who, size in memory.items()}
    least, most = (choose(sizes, key=sizes.__getitem__) for choose in (min, max))
    if sizes[most] > UNEQUAL * sizes[least]:
        raise PolybitError(
            f"the GPUs differ: {least} has {sizes[least] / 1e9:.0f} GB and {most} {sizes[most] / 1e9:.0f} GB; choose "
            "equal ones with CUDA_VISIBLE_DEVICES"
        )


def ready(threads: int) -> None:
    """Called in a worker before all else: its threads, and no progress bars of its own."""
    Shown.progress = False
    torch.set_num_threads(threads)


def portable(error: BaseException) -> BaseException:
    """An error as one that can be sent, with what it says; a lack of memory as a sentence."""
    import pickle
    import traceback

    if lacks_memory(error):
        return PolybitError(
            f"a worker on {socket.gethostname()} ran out of memory ({error!s:.100}): give fewer --workers, or machines "
            "with more"
        )
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:
        pass
    return RuntimeError("".join(traceback.format_exception(error)))
