"""What a study says, before it is set as a page or as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from polybit.report.frame import scrolled

Section = tuple[str, str, Sequence[str]]  # title, HTML, sentences


@dataclass(frozen=True, slots=True)
class StudyReading:
    """title, what was done, the table that a terminal shows too (header, rows), and the sections."""

    title: str
    intro: Sequence[str]
    table: tuple[list[str], list[list[str]]]
    sections: Sequence[Section]


def estimate(value: Mapping[str, Any], scale: float = 100.0, digits: int = 1) -> str:
    """A mean with its interval."""
    number, low, high = (f"{scale * value[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{number} [{low}, {high}]"


def html_table(header: list[str], rows: list[list[str]]) -> str:
    """A table; the first column names the row."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = ""
    for name, *cells in rows:
        body += f'<tr><th class="row">{escape(name)}</th>' + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>"
    return scrolled(f"<table><tr>{head}</tr>{body}</table>")
