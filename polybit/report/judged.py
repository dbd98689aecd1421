"""Judged answers as tables: win, tie, lose and grades of the endpoint; fidelity beside them, labelled as such."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polybit.core.parts import load
from polybit.evals.table import JUDGING
from polybit.report.tables import aligned, estimate, number, percentage

Json = Mapping[str, Any]
Table = tuple[str, list[str], list[list[str]]]


def pair_table(numbers: Json) -> Table | None:
    """Table 1 of QDPO for these rows: win, tie, lose (the lose-rate), ties in the denominator."""
    rows = {name: row["pair"] for name, row in numbers["rows"].items() if "pair" in row}
    if not rows:
        return None
    header = ["row", "win", "tie", "lose-rate", "win − lose", "both orders agree", "games", "no verdict"]
    table = []
    for name, row in rows.items():
        cells = [name, *(percentage(row[key]) or "–" for key in ("win", "tie", "lose"))]
        missing = row["unparsed"] + row["refused"] + row["unanswered"]
        cells += [estimate(row["win_minus_lose"]) or "–", percentage(row["consistent"]) or "–", str(row["decided"])]
        table.append([*cells, faults(row) if missing else "0"])
    return f"Judged by {numbers['judge']['model']} against {numbers['baseline']}", header, table


def faults(row: Json) -> str:
    """How many verdicts are missing and why."""
    parts = [f"{row[key]} {key}" for key in ("unparsed", "refused", "unanswered") if row[key]]
    return ", ".join(parts) or "0"


def grade_table(numbers: Json) -> Table | None:
    """Table 2: mean grades from 1 to 10, by turn."""
    rows = {name: row["single"] for name, row in numbers["rows"].items() if "single" in row}
    if not rows:
        return None
    turns = sorted({turn for row in rows.values() for turn in row["by_turn"]})
    header = ["row", "grade 1–10", *(f"turn {turn}" for turn in turns), "no verdict"]
    table = [
        [name, estimate(row["mean"]) or "–", *(estimate(row["by_turn"].get(t)) or "–" for t in turns), faults(row)]
        for name, row in rows.items()
    ]
    return f"Single answers graded by {numbers['judge']['model']}", header, table


def skill_table(numbers: Json) -> Table | None:
    """Table 3: mean grades from 1 to 5 for each skill."""
    rows = {name: row["skills"] for name, row in numbers["rows"].items() if "skills" in row}
    if not rows:
        return None
    skills = sorted({skill for row in rows.values() for skill in row["by_skill"]})
    table = []
    for name, row in rows.items():
        grades = [row["by_skill"].get(skill) for skill in skills]
        table.append([name, *(number(grade["value"]) if grade else "–" for grade in grades), faults(row)])
    return f"Skills graded by {numbers['judge']['model']}, 1–5", ["row", *skills, "no verdict"], table


def fidelity_table(numbers: Json) -> Table | None:
    """How close to the float model's own answers; nothing here is about quality."""
    rows = {name: row for name, row in numbers["rows"].items() if "closeness" in row}
    if not rows:
        return None
    header = ["row", "win", "tie", "lose-rate", "win − lose", "same answer", "shared prefix", "ROUGE-L", "nats/token"]
    table = []
    for name, row in rows.items():
        close, games = row["closeness"], row.get("fidelity")
        cells = [percentage(games[key]) for key in ("win", "tie", "lose")] if games else ["–"] * 3
        cells.append(estimate(games["win_minus_lose"]) if games else "–")
        cells += [percentage(close[key]) for key in ("exact", "prefix")]
        table.append([name, *cells, estimate(close["rouge_l"]), estimate(close["nats"]) or "–"])
    title = (
        f"Fidelity (closeness to the float model's answers, not quality), rows against {numbers['fidelity_baseline']}"
    )
    return title, header, table


def tables(numbers: Json) -> list[Table]:
    """All tables there are numbers for."""
    made = (load(mode.table)(numbers) for mode in JUDGING.values())
    return [table for table in made if table is not None]


def terminal_tables(numbers: Json) -> str:
    """The tables in plain text, and what is still missing."""
    text = "\n\n".join(f"{title}\n{aligned(header, rows)}" for title, header, rows in tables(numbers))
    missing = sum(
        row[mode]["unanswered"]
        for row in numbers["rows"].values()
        for mode, kind in JUDGING.items()
        if kind.asks and mode in row
    )
    if missing:
        text += f"\n\n{missing} verdicts got no reply and are not in the numbers: the same command asks for them again."
    cut = {name: row["dropped"] for name, row in numbers["rows"].items() if row["dropped"]}
    if cut:
        worst = max(cut, key=lambda name: cut[name])
        text += (
            f"\n\nThe context was too short in places: {worst} answered {cut[worst]} times without the oldest exchange."
        )
    return text
