"""What a study says about conversation: does it suffer before accuracy, what mends it, and what margins have to do
with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polybit.report.frame import pictured, short_name
from polybit.report.plots import dots
from polybit.report.study_reading import Section, StudyReading, estimate, html_table

Json = Mapping[str, Any]


def reading(facts: Json) -> StudyReading:
    """The page of a study."""
    asked = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in facts["asked"].items())
    seeds = len({arm["seed"] for arm in facts["arms"].values()})
    settings = facts["config"]
    intro = [
        f"{asked}; {seeds} seed(s) of training. Brackets are 95 % bootstrap intervals over prompts, windows or "
        "questions; differences are paired.",
        "Flips: tokens of the float model's answers for which another one is likelier. KL over its 64 likeliest tokens "
        "and the rest. Same: free answers that are the float model's own.",
        f"Alignment: {settings['steps']} steps of {settings['batch']} prompts.",
    ]
    return StudyReading(f"Conversation of {short_name(facts['model'])}", intro, table(facts), sections(facts))


def table(facts: Json) -> tuple[list[str], list[list[str]]]:
    """Every row against the float model."""
    header = ["", "bits", "flips, %", "KL, nats", "same answers, %", "perplexity", "score, %", "its difference, points"]
    rows = []
    for label, row in facts["rows"].items():
        score = row.get("task_mean")
        shown = [estimate(score), "" if label == "float" else estimate(score["difference"])] if score else ["", ""]
        rows.append([
            label, f"{row['bits']:.2f}", estimate(row["flips"]), estimate(row["kl"], 1, 4), estimate(row["same"]),
            estimate(row["perplexity"], 1, 2), *shown,
        ])  # fmt: skip
    return header, rows


def plain_rows(facts: Json) -> list[str]:
    """Labels of rows that were quantized and not aligned."""
    return [label for label, arm in facts["arms"].items() if not arm["objective"]]


def verdict(facts: Json) -> list[str]:
    """Whether the claim holds, from the rows that were only quantized."""
    rows = facts["rows"]
    early: list[str] = []
    both: list[str] = []
    for label in plain_rows(facts):
        row = rows[label]
        if "task_mean" not in row:
            return ["No questions with right answers were asked (--choices), so nothing is said of accuracy."]
        lost = row["task_mean"]["difference"]
        said = (
            f"{label}: {estimate(row['flips'])} % of tokens flip, {100 * (1 - row['same']['value']):.0f} % of answers "
            f"differ, score {estimate(lost)} points"
        )
        (both if lost["high"] < 0 else early).append(said)
    answer = "No: wherever answers change, the score falls too."
    if early:
        answer = "Yes: answers change where no fall of the score is shown."
    if early and both:
        answer = "Yes at first: answers change where no fall of the score is shown, and further down both suffer."
    found = [answer]
    found += ["No fall shown: " + "; ".join(early) + "."] * bool(early)
    found += ["Both: " + "; ".join(both) + "."] * bool(both)
    changed = [f"{label} {estimate(rows[label]['task_mean']['changed'])}" for label in plain_rows(facts)]
    return [*found, "Answers to questions with choices that changed sides, %: " + ", ".join(changed) + "."]


def mended(facts: Json) -> tuple[list[str], list[list[str]]]:
    """What alignment gave, against what each began from."""
    header = ["", "fewer flips, %", "less KL, %", "nearer − farther answers, %", "perplexity, nats", "score, points"]
    rows = []
    for label, change in facts["against"].items():
        score = change.get("task_mean")
        rows.append([
            label, fewer(change["flips_left"]), fewer(change["kl_left"]),
            estimate(change["fidelity"]["win_minus_lose"]), estimate(change["nll"], 1, 3),
            estimate(score) if score else "",
        ])  # fmt: skip
    return header, rows


def fewer(left: Json) -> str:
    """A share that is left as how much is gone, in %."""
    return estimate({"value": 1 - left["value"], "low": 1 - left["high"], "high": 1 - left["low"]})


def mending(facts: Json) -> list[str]:
    """One sentence for every objective."""
    found = []
    for label, change in facts["against"].items():
        left, score = change["flips_left"], change.get("task_mean")
        said = f"{label}: {fewer(left)} % fewer flips" if left["high"] < 1 else f"{label}: fewer flips are not shown"
        if score:
            harmed = score["low"] if score["high"] < 0 else None
            said += ", and the score falls" if harmed is not None else ", and no fall of the score is shown"
        found.append(said + ".")
    return found or ["Nothing was aligned."]


def margins(facts: Json) -> tuple[list[str], list[list[str]]]:
    """Probability of the likeliest token minus that of the second, and what it is at the float model's."""
    header = ["", "margin", "against float", "against its start"]
    rows = []
    for label, row in facts["rows"].items():
        own = "" if label == "float" else estimate(row["margin_difference"], 1, 4)
        start = facts["against"].get(label)
        rows.append([label, estimate(row["margin"], 1, 3), own, estimate(start["margin"], 1, 4) if start else ""])
    return header, rows


def narrower(facts: Json) -> list[str]:
    """Whether quantized models have narrower margins, and whether wider ones mean fewer flips."""
    rows = facts["rows"]
    less = [label for label in plain_rows(facts) if rows[label]["margin_difference"]["high"] < 0]
    return [
        f"Margins are surely narrower than the float model's at {', '.join(less)}."
        if less
        else "No row that was only quantized has surely narrower margins than the float model."
    ]


def sections(facts: Json) -> list[Section]:
    """The three answers."""
    points = [
        (label, 1 - row["same"]["value"], row["task_mean"]["difference"])
        for label, row in facts["rows"].items()
        if label != "float" and "task_mean" in row
    ]
    drawn = ""
    if points:
        drawn = pictured(
            dots(
                [(label, 100 * x, {k: 100 * y[k] for k in ("value", "low", "high")}) for label, x, y in points],
                "free answers that differ from the float model's, %",
                "score minus the float model's, points",
            )
        )
    return [
        ("Does conversation suffer before accuracy?", drawn + html_table(*table(facts)), verdict(facts)),
        ("What mends it?", html_table(*mended(facts)) if facts["against"] else "", mending(facts)),
        ("What happens to margins?", html_table(*margins(facts)), narrower(facts)),
    ]
