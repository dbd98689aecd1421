"""The result table: for the terminal, and as Markdown for the model card and the README."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polybit.report.html import task_score
from polybit.report.tables import aligned, estimate, markdown, number, percentage, size


def rows(numbers: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows), one row per precision after the float model's."""
    reference = numbers["reference"]
    tasks = list(reference["tasks"])
    header = ["precision", "bits/weight", "bytes read", "perplexity", "KL (nats)", "top-1", "flips", *tasks]
    first = ["float", "", "", f"{reference['perplexity']['value']:.3f}", "0", "100 %", "0 %"]
    table = [first + [short(task_score(reference["tasks"][task], task)) for task in tasks]]
    for name, row in numbers["presets"].items():
        cells = [name, number(row.get("bits_per_weight"), 4), size(row["bytes"]) if "bytes" in row else ""]
        cells += [f"{row['perplexity']['value']:.3f}", estimate(row["kl"]), percentage(row["top1"])]
        cells.append(short(row["flips"] or row["flips_text"]))
        table.append(cells + [short(task_score(row["tasks"][task], task)) for task in tasks])
    return header, table


def short(value: Mapping[str, Any] | None) -> str:
    """An Estimate of a share as a percentage with the half-width of its interval."""
    if value is None:
        return ""
    half = 50 * (value["high"] - value["low"])
    return f"{100 * value['value']:.1f} ± {half:.1f} %"


def terminal_table(numbers: Mapping[str, Any]) -> str:
    """The table in plain text."""
    header, table = rows(numbers)
    return aligned(header, table)


def markdown_table(numbers: Mapping[str, Any]) -> str:
    """The table in Markdown."""
    header, table = rows(numbers)
    return markdown(header, table)
