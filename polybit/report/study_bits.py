"""What a study says about bits: do text and tasks rank layers alike, and do fewer bits well spent replace even ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polybit.report.frame import pictured, short_name
from polybit.report.plots import dots
from polybit.report.study_conversation import fewer, table
from polybit.report.study_reading import Section, StudyReading, estimate, html_table

Json = Mapping[str, Any]


def reading(facts: Json) -> StudyReading:
    """The page of a study."""
    asked = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in facts["asked"].items())
    widths = ", ".join(f"{count} at {width}" for width, count in facts["layers_by_width"].items())
    seeds = len(str(facts["config"]["seeds"]).split(","))
    intro = [
        f"{asked}; {seeds} seed(s) of calibration. Brackets are 95 % bootstrap intervals over prompts, windows or "
        "questions; differences are paired.",
        f"The plan's layers by width: {widths}. Bits count scales and zero points.",
    ]
    return StudyReading(f"Bits of {short_name(facts['model'])}", intro, table(facts), sections(facts))


def rankings(facts: Json) -> tuple[list[str], list[list[str]]]:
    """How alike text and tasks rank the layers, and each with itself."""
    rows = []
    for label, found in facts["agreement"].items():
        sure = ", ".join(f"{name} {'–' if tau is None else f'{tau:.2f}'}" for name, tau in found["reliability"].items())
        rows.append([label.removeprefix("of "), estimate(found["tau"], 1, 2), sure])
    return ["rankings", "Kendall's tau", "each with itself, by halves"], rows


def illusion(facts: Json) -> list[str]:
    """Whether general text ranks layers otherwise than a task does, where both rankings are reliable."""
    found = []
    for label, one in facts["agreement"].items():
        taus = [tau for tau in one["reliability"].values() if tau is not None]
        name = label.removeprefix("of ")
        if not taus or min(taus) < RELIABLE:
            found.append(f"{name}: not decided, because a ranking hardly agrees with itself.")
        elif one["tau"]["low"] > 0:
            alike = "alike" if one["tau"]["high"] >= min(taus) else "alike in part, each more like itself"
            found.append(f"{name}: they rank layers {alike}, tau {estimate(one['tau'], 1, 2)}; no illusion.")
        else:
            found.append(f"{name}: no agreement is shown, tau {estimate(one['tau'], 1, 2)}.")
    return found or ["No task was given (--tasks)."]


RELIABLE = 0.3  # tau of two halves of one ranking below which it says little


def inversion(facts: Json) -> list[str]:
    """Whether the plan is as good as even bits, against each."""
    found = []
    for label, one in facts["against"].items():
        left, score = one["kl_left"], one.get("task_mean")
        kl = "less" if left["high"] < 1 else "more" if left["low"] > 1 else "no other"
        said = f"{label}: {kl} KL ({estimate(left, 1, 2)} times)"
        if score:
            way = "higher" if score["low"] > 0 else "lower" if score["high"] < 0 else "no other"
            said += f", {way} score ({estimate(score)} points)"
        inverted = left["high"] < 1 and (not score or score["high"] >= 0)
        found.append(f"{said}. Precision inversion: {'yes' if inverted else 'no'}.")
    return found


def against(facts: Json) -> tuple[list[str], list[list[str]]]:
    """The plan against every even width."""
    rows = []
    for label, one in facts["against"].items():
        score = estimate(one["task_mean"]) if "task_mean" in one else ""
        rows.append([label, fewer(one["flips_left"]), estimate(one["kl_left"], 1, 2), score])
    return ["", "fewer flips, %", "KL, times", "score, points"], rows


def sections(facts: Json) -> list[Section]:
    """The two answers."""
    points = [(label, row["bits"], row["kl"]) for label, row in facts["rows"].items() if label != "float"]
    drawn = dots(points, "bits per weight", "KL to the float model, nats")
    return [
        ("Do text and tasks rank layers alike?", html_table(*rankings(facts)), illusion(facts)),
        (
            "Do fewer bits, well spent, replace even ones?",
            pictured(drawn) + html_table(*table(facts)) + html_table(*against(facts)),
            inversion(facts),
        ),
    ]
