"""The page of `polybit study`, and the same as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from polybit.acts.table import STUDIES
from polybit.core.parts import load
from polybit.report.frame import framed
from polybit.report.study_reading import StudyReading
from polybit.report.tables import aligned

Json = Mapping[str, Any]


def read(facts: Json) -> StudyReading:
    """What the numbers of a study say."""
    made: StudyReading = load(STUDIES[facts["question"]].reading)(facts)
    return made


def page(facts: Json) -> str:
    """One self-contained HTML page."""
    said = read(facts)
    parts = [f"<p>{escape(sentence)}</p>" for sentence in said.intro]
    for heading, body, sentences in said.sections:
        parts.append(f"<h2>{escape(heading)}</h2>{body}" + "".join(f"<p>{escape(one)}</p>" for one in sentences))
    return framed(said.title, *parts)


def text_summary(facts: Json) -> str:
    """The answers as text."""
    said = read(facts)
    lines = [aligned(*said.table)]
    for heading, _, sentences in said.sections:
        lines += ["", heading, *sentences]
    return "\n".join(lines)
