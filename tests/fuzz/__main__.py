"""Change files by chance and see every reader read or refuse them; goes on where it stopped.

    python -m tests.fuzz                                  # 100,000 cases of every reader
    python -m tests.fuzz plan mix --cases 1000 --journal fuzz.json

A case is a number: the same one gives the same file. It is *read*, or *refused* by one sentence (PolybitError). All
else is a fault: another error, more than one line, more than DEADLINE CPU seconds, a file that is lost, HTML that
comes through.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.readers import READERS, Case
from tests.fuzz.room import furnish

DEADLINE = 30  # CPU seconds of one case; readers wait for nothing, and a shared machine stands still at times
LONGEST = 1200  # characters of a sentence
KEEP = 20  # faults described of each reader


class TooLong(BaseException):
    """A case that does not end; no Exception, so that no reader takes it for a fault of its input."""


def overdue(*_: Any) -> None:
    """What the timer calls."""
    raise TooLong


def outcome(case: Case, reader: str, number: int, folder: Path) -> tuple[str, str]:
    """("read" | "refused" | "fault", what was said) of one case in an empty folder."""
    from cyclopts import CycloptsError

    from polybit.core.runtime import PolybitError

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    signal.setitimer(signal.ITIMER_PROF, DEADLINE)
    try:
        with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            read = case(Random(f"{reader} {number}"), folder)
            before = sorted(folder.rglob("*"))
            try:
                read()
                said, verdict = "", "read"
            except (PolybitError, CycloptsError) as error:
                said, verdict = str(error), "refused"
        signal.setitimer(signal.ITIMER_PROF, 0)
        if (
            verdict == "refused"
            and isinstance(said, str)
            and reader != "recipe"
            and ("\n" in said or len(said) > LONGEST)
        ):
            return "fault", f"not one short sentence: {said[:300]!r}"
        if sorted(folder.rglob("*")) != before:
            return "fault", "files were lost or left behind"
        return verdict, said
    except TooLong:
        return "fault", f"longer than {DEADLINE} CPU s"
    except SystemExit as error:
        return "refused", f"exit {error.code}"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return "fault", f"{type(error).__name__}: {str(error)[:200]} at {Path(last.filename).name}:{last.lineno}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def run(reader: str, case: Case, found: dict[str, Any], cases: int, folder: Path, keep: Any) -> None:
    """Cases of one reader from where it stopped; `keep` is called now and then."""
    began = time.process_time()
    spent = found["cpu_seconds"]
    for number in range(found["cases"], cases):
        verdict, said = outcome(case, reader, number, folder)
        found[verdict] += 1
        if verdict == "fault" and len(found["faults"]) < KEEP:
            found["faults"].append({"case": number, "said": said})
        found["cases"] = number + 1
        found["cpu_seconds"] = round(spent + time.process_time() - began, 1)
        if number % 500 == 499 or number + 1 == cases:
            keep()


def main() -> None:
    """Every reader asked for, one after another; the journal is whole at every moment."""
    from polybit.core.runtime import write_json

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("readers", nargs="*", default=list(READERS))
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--journal", type=Path, default=Path("fuzz.json"))
    parser.add_argument("--room", type=Path, default=Path("fuzz-room"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, overdue)
    journal = json.loads(options.journal.read_text()) if options.journal.is_file() else {}
    room = furnish(options.room)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for reader in options.readers:
            fresh = {"cases": 0, "read": 0, "refused": 0, "fault": 0, "cpu_seconds": 0.0, "faults": []}
            found = journal.setdefault(reader, fresh)
            keep = lambda: write_json(options.journal, journal)  # noqa: E731
            run(reader, READERS[reader](room), found, options.cases, Path(folder) / "case", keep)
            print(reader, {key: value for key, value in found.items() if key != "faults"}, file=sys.stderr, flush=True)
            for fault in found["faults"]:
                print("   ", fault, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
