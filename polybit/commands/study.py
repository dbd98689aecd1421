"""`polybit study`: the questions about switchable precision answered for one model, with tables and figures."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from polybit.options.study import StudyOptions
from polybit.report.study import text_summary


def study(model: str, /, *, options: Annotated[StudyOptions, Parameter(name="*")]) -> None:
    """Quantize MODEL, train it in every way, score, search, attack, and write one page that answers the questions.

    Every part that is finished is kept in --out and not done again, so an interrupted study goes on.
    """
    from polybit.acts.study import study as act

    run = act(model, options)
    print(text_summary(run.numbers))
    print(f"\nPage: {options.out / 'study.html'}")
