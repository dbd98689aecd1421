"""Tables of what `polybit eval` measured on request: a function for each of SUITES in evals/table.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polybit.core.parts import load
from polybit.evals.table import SUITES
from polybit.report.tables import aligned, estimate, number, percentage

Json = Mapping[str, Any]
Table = tuple[str, list[str], list[list[str]]]
ARMS = {
    "float": "(i) float",
    "forced_flip": "(ii) float, flipped token forced",
    "continuation": "(iii) float's token, then quantized",
    "quantized": "(iv) quantized",
}


def choices_table(numbers: Json) -> Table | None:
    """Accuracy by set and precision, the paired difference and the answers that changed sides."""
    if not numbers.get("choices"):
        return None
    rows = []
    for name, entry in numbers["choices"].items():
        for metric, score in entry["reference"].items():
            guess = f"{100 * entry['chance']:.0f} %" if entry["chance"] else "–"
            rows.append([name, metric, "float", percentage(score), "", "", "", "", guess])
            for preset, found in entry["presets"].items():
                row = found[metric]
                cells = [
                    percentage(row[key]) for key in ("difference", "flips", "correct_to_wrong", "wrong_to_correct")
                ]
                rows.append(["", "", preset, percentage(row), *cells, ""])
    header = ["set", "metric", "precision", "score", "difference", "answers changed", "right → wrong", "wrong → right"]
    return "Questions with choices", [*header, "chance"], rows


def lm_eval_table(numbers: Json) -> Table | None:
    """lm-eval's figures by task and precision."""
    if not numbers.get("lm_eval"):
        return None
    rows = []
    for task, entry in numbers["lm_eval"].items():
        for metric, value in entry["reference"].items():
            cells = [task, metric, number(value)]
            cells += [number(found[metric]["value"]) for found in entry["presets"].values()]
            rows.append(cells)
    presets = next(iter(numbers["lm_eval"].values()))["presets"]
    return "lm-eval", ["task", "metric", "float", *presets], rows


def breakdown_table(numbers: Json) -> Table | None:
    """What the flipped token does and what the quantized model does after it."""
    found = {name: row["breakdown"] for name, row in numbers.get("presets", {}).items() if row.get("breakdown")}
    if not found:
        return None
    rows = []
    for name, entry in found.items():
        for arm, title in ARMS.items():
            cells = [name if arm == "float" else "", title]
            cells += [estimate(entry["arms"][arm][key]) for key in ("damage", "tail_nats")]
            rows.append([*cells, str(entry["n"]) if arm == "float" else ""])
        rows.append(["", "(ii) − (iii)", estimate(entry["forced_minus_continuation"]), "", ""])
    header = [
        "precision",
        "answer",
        "damage after the flip (1 − ROUGE-L)",
        "nats per token, float model",
        "answers that part",
    ]
    return "The flip itself, or what is written after it", header, rows


def talk_table(numbers: Json) -> Table | None:
    """Drift over long conversations: first and last turn, and the change over the talk."""
    if not numbers.get("talk"):
        return None
    talk = numbers["talk"]
    rows = []
    for name, entry in talk["presets"].items():
        for key, title in (("own", "own history"), ("given", "float history")):
            side = entry[key]
            cells = [name if key == "own" else "", title]
            cells += [estimate(side["rouge_l"][turn]) for turn in (0, -1)]
            cells += [estimate(side["change"][measure]) for measure in ("rouge_l", "repeated", "length_ratio")]
            rows.append([*cells, estimate(entry["flips_change"], percent_points) if key == "given" else ""])
    header = ["precision", "history", "ROUGE-L, turn 1", f"turn {talk['turns']}", "change", "change of repetition"]
    title = f"Drift over {talk['turns']} turns, {talk['conversations']} conversations (change: last quarter − first)"
    return title, [*header, "change of length", "change of flips"], rows


def percent_points(value: float) -> str:
    """A share as percentage points."""
    return f"{100 * value:+.1f} points"


def squad_table(numbers: Json) -> Table | None:
    """Exact match and F1 of every precision."""
    if not numbers.get("squad"):
        return None
    squad = numbers["squad"]
    rows = [
        [label, percentage(row["em"]), percentage(row["f1"]), percentage(row.get("difference", {}).get("f1"))]
        for label, row in squad["scores"].items()
    ]
    title = f"{squad['file']}, {squad['questions']} questions, {squad['head']}: EM, F1"
    return title, ["precision", "EM", "F1", "difference of F1"], rows


def tables(numbers: Json) -> list[Table]:
    """All tables there are numbers for, in the order of SUITES."""
    made = (load(suite.table)(numbers) for suite in SUITES.values() if suite.table is not None)
    return [table for table in made if table is not None]


def terminal_tables(numbers: Json) -> str:
    """The tables in plain text, each after an empty line; nothing where nothing was asked for."""
    return "".join(f"\n{title}\n{aligned(header, rows)}\n" for title, header, rows in tables(numbers))
