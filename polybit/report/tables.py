"""Numbers as people read them: sizes, intervals, Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def size(count: float) -> str:
    """Bytes with a unit: 1.44 MB (powers of 1000, as file managers show)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, without an exponent where it can be read; an empty cell for None."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    if abs(value) < 10 ** -(digits + 1):
        return f"{value:.1e}"
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(value: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * value:.1f} %"


def estimate(value: Mapping[str, Any] | None, form=number) -> str:
    """An Estimate as `0.039 [0.037, 0.041]`."""
    if value is None:
        return ""
    return f"{form(value['value'])} [{form(value['low'])}, {form(value['high'])}]"


def percentage(value: Mapping[str, Any] | None) -> str:
    """An Estimate of a share as `89.9 [89.1, 90.5] %`."""
    if value is None:
        return ""
    return f"{100 * value['value']:.1f} [{100 * value['low']:.1f}, {100 * value['high']:.1f}] %"


def short_percentage(value: Mapping[str, Any] | None) -> str:
    """An Estimate of a share as `89.9 ± 0.7 %`, with the half-width of its interval."""
    if value is None:
        return ""
    half = 50 * (value["high"] - value["low"])
    return f"{100 * value['value']:.1f} ± {half:.1f} %"


def level(value: Mapping[str, Any] | None) -> str:
    """The mean of an Estimate alone, three decimals."""
    return "" if value is None else f"{value['value']:.3f}"


FORMS = {"number": estimate, "level": level, "share": percentage, "short share": short_percentage}


def cell(value: Any, form: str) -> str:
    """An Estimate or a number in the form a metric asks for; an empty cell for None."""
    if value is None or isinstance(value, Mapping):
        return FORMS[form](value)
    return f"{100 * value:.3g} %" if form.endswith("share") else number(value)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain-text table for the terminal: first column left, the others right."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = []
    for row in table:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)
