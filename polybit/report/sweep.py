"""The table of a sweep: a row per combination and precision, means over seeds, the difference to the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polybit.evals.table import METRICS
from polybit.report.tables import aligned, estimate, markdown, number


def table_cells(numbers: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows)."""
    tasks = [key for key in numbers["rows"][0]["numbers"] if key not in (*METRICS, "bits_per_weight", "bytes")]
    header = ["run", "bits/weight", "KL (nats)", f"KL less that of {numbers['baseline']}", "perplexity", *tasks, "s"]
    rows = []
    for row in numbers["rows"]:
        got = row["numbers"]
        difference = row.get("difference", {}).get("kl")
        rows.append(
            [
                f"{row['name']}, {row['preset']}",
                number(got.get("bits_per_weight", {}).get("value"), 4),
                estimate(got["kl"]),
                estimate(difference) if difference else "",
                estimate(got["perplexity"]),
                *(estimate(got.get(task)) for task in tasks),
                number(row["seconds"]["value"]),
            ]
        )
    return header, rows


def sweep_page(numbers: Mapping[str, Any]) -> str:
    """The table in Markdown, with a line that says what the intervals are."""
    note = f"Mean over {len(numbers['seeds'])} seeds with 95 % Student intervals; differences are paired by seed."
    return markdown(*table_cells(numbers)) + f"\n\n{note}\n"


def sweep_table(numbers: Mapping[str, Any]) -> str:
    """The table for the terminal."""
    return aligned(*table_cells(numbers))
