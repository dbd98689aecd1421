"""A question of STUDIES answered for one model: the table, the figure, and the sentence that answers it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from polybit.acts.table import STUDIES
from polybit.core.parts import load
from polybit.core.records import Run
from polybit.core.runtime import atomic_path, write_json
from polybit.options.checks import plain
from polybit.options.study import StudyOptions
from polybit.report.plots import figure
from polybit.report.study import page


def study(model: str, options: StudyOptions) -> Run:
    """Answer a question about MODEL (`--question`) with a table, a figure and a sentence, on one page.

    Every part that is finished is kept in `out` and not done again, so an interrupted study goes on.
    """
    figure()  # a missing library is said before the work, not after it
    run = Run("study", {"model": model, **plain(options)})
    answer: Callable[[str, StudyOptions], dict[str, Any]] = load(STUDIES[options.question].answer)
    with run.timed():
        run.numbers = {"question": options.question, **answer(model, options)}
    write_json(options.out / "study.json", run.numbers)
    write_page(options.out / "study.html", run.numbers)
    return run


def write_page(path: Path, numbers: dict[str, Any]) -> None:
    """The page appears whole or not at all."""
    with atomic_path(path) as staged:
        staged.write_text(page(numbers), encoding="utf-8")
