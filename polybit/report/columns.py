"""Columns of result tables, walked from the table of metrics: in narrow tables (terminal, model card) and on pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polybit.evals.table import METRICS, TASKS, Metric, Where
from polybit.report.tables import cell, percentage, short_percentage

Json = Mapping[str, Any]
NO_METRIC = ("difference", "flips", "correct_to_wrong", "wrong_to_correct", "predictions_sha256")


def chosen(where: Where) -> dict[str, Metric]:
    """The metrics such a table shows."""
    return {key: metric for key, metric in METRICS.items() if where in metric.where}


def headings(where: Where, tasks: Sequence[str] = ()) -> list[str]:
    """One heading per metric, then the tasks."""
    narrow = where == "narrow"
    return [(narrow and metric.short) or metric.title for metric in chosen(where).values()] + list(tasks)


def float_cells(reference: Json, where: Where, tasks: Sequence[str] = ()) -> list[str]:
    """The float model's row: its own numbers where it has some, else what a metric is where nothing is lost."""
    found = []
    for key, metric in chosen(where).items():
        value = reference.get(key, metric.harmless if "perplexity" in reference else None)
        found.append(cell(value, form(metric, where)))
    return found + [task_cell(reference["tasks"][task], task, where) for task in tasks]


def cells(row: Json, where: Where, tasks: Sequence[str] = ()) -> list[str]:
    """The row of one precision; what it does not have is an empty cell."""
    found = []
    for key, metric in chosen(where).items():
        value = row.get(key)
        if value is None and where == "narrow":
            value = row.get(metric.instead)
        found.append(cell(value, form(metric, where)))
    return found + [task_cell(row["tasks"].get(task, {}), task, where) for task in tasks]


def form(metric: Metric, where: Where) -> str:
    """How a cell is written there."""
    return (where == "narrow" and metric.narrow) or metric.form


def task_cell(row: Json, task: str, where: Where) -> str:
    """The score of a task."""
    return (short_percentage if where == "narrow" else percentage)(task_score(row, task))


def task_score(row: Json, task: str) -> Json | None:
    """The main metric of a task."""
    if task in TASKS and TASKS[task].correct in row:
        return row[TASKS[task].correct]
    return next((value for key, value in row.items() if key not in NO_METRIC), None)
