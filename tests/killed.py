"""A forked child that kills itself with -9 at a chosen moment of its work: every moment is an event Python audits."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

IMPORTS = ("import", "compile", "exec", "marshal.loads")  # these depend on what the parent has loaded already


def forked(work: Callable[[], object]) -> int:
    """The status of a child that does the work; 0 = done, 1 = an error."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        work()
        status = 0
    finally:
        os._exit(status)


def watching(seen: Callable[[str], None]) -> None:
    """Call `seen` with every audited event of this process from now on."""
    sys.addaudithook(lambda event, _: None if event in IMPORTS else seen(event))


def moments(work: Callable[[], object], kept: Path) -> int:
    """How many events the work has; written to the file `kept` by the child."""

    def counted() -> None:
        count = [0]
        watching(lambda _: count.__setitem__(0, count[0] + 1))
        work()
        kept.write_text(str(count[0]))

    assert forked(counted) == 0
    return int(kept.read_text())


def killed_at(moment: int, work: Callable[[], object]) -> bool:
    """Do the work in a child that kills itself before its event number `moment`; whether it was killed."""

    def dying() -> None:
        count = [0]

        def seen(_: str) -> None:
            count[0] += 1
            if count[0] == moment:
                os.kill(os.getpid(), signal.SIGKILL)

        watching(seen)
        work()

    return os.WIFSIGNALED(forked(dying))
