"""A question of STUDIES answered for one model: the table, the figure, and the sentence that answers it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from polybit.acts.table import STUDIES
from polybit.core.parts import load
from polybit.core.records import Run
from polybit.core.runtime import PolybitError, atomic_path, write_json
from polybit.hub.directory import output_lock
from polybit.hub.files import read_json
from polybit.options.checks import plain
from polybit.options.study import StudyOptions
from polybit.report.plots import figure
from polybit.report.study import page

ASKED = "asked.json"  # what decided the parts that are there
GROWING = (  # settings that name parts, each in files of its own; the rest decides what is in them
    "out", "seeds", "arms", "bits", "aligned_bits", "quantizers", "starts", "objectives", "planned_by", "uniform",
    "trust_remote_code",
)  # fmt: skip


def study(model: str, options: StudyOptions) -> Run:
    """Answer a question about MODEL (`--question`) with a table, a figure and a sentence, on one page.

    Every part that is finished is kept in `out` and not done again, so an interrupted study goes on.
    """
    figure()  # a missing library is said before the work, not after it
    run = Run("study", {"model": model, **plain(options)})
    answer: Callable[[str, StudyOptions], dict[str, Any]] = load(STUDIES[options.question].answer)
    with output_lock(options.out):
        check_parts(model, options)
        with run.timed():
            run.numbers = {"question": options.question, **answer(model, options)}
        write_json(options.out / "study.json", run.numbers)
        write_page(options.out / "study.html", run.numbers)
    return run


def check_parts(model: str, options: StudyOptions) -> None:
    """Refuse an output whose finished parts were made under other settings, which would be mixed in silence."""
    told = {"model": model, **{name: value for name, value in plain(options).items() if name not in GROWING}}
    path = options.out / ASKED
    if not path.is_file():
        write_json(path, told)
        return
    found = read_json(path)
    for name in sorted(found.keys() & told.keys()):
        if found[name] != told[name]:
            raise PolybitError(
                f"{options.out} holds parts of a study whose {name} was {found[name]!r:.80} and not "
                f"{told[name]!r:.80}: repeat that one, or choose another --out"
            )


def write_page(path: Path, numbers: dict[str, Any]) -> None:
    """The page appears whole or not at all."""
    with atomic_path(path) as staged:
        staged.write_text(page(numbers), encoding="utf-8")
