"""The result table: for the terminal, and as Markdown for the model card and the README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polybit.report.columns import cells, float_cells, headings
from polybit.report.tables import aligned, markdown, number, size


def rows(numbers: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows), one row per precision after the float model's; columns that nobody fills are left out."""
    reference = numbers["reference"]
    tasks = list(reference["tasks"])
    header = ["precision", "bits/weight", "bytes read", *headings("narrow", tasks)]
    table = [["float", "", "", *float_cells(reference, "narrow", tasks)]]
    for name, row in numbers["presets"].items():
        sizes = [number(row.get("bits_per_weight"), 4), size(row["bytes"]) if "bytes" in row else ""]
        table.append([name, *sizes, *cells(row, "narrow", tasks)])
    kept = [n for n in range(len(header)) if any(row[n] for row in table)]
    return [header[n] for n in kept], [[row[n] for n in kept] for row in table]


def terminal_table(numbers: Mapping[str, Any]) -> str:
    """The table in plain text."""
    header, table = rows(numbers)
    return aligned(header, table)


def markdown_table(numbers: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    header, table = rows(numbers)
    return markdown(header, table)
