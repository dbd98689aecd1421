"""What a study says about switchable precision: six questions, each with its table, its figure and a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polybit.acts.table import ARMS
from polybit.report.frame import pictured, short_name
from polybit.report.frontier import frontier_figure
from polybit.report.robustness import heat_map
from polybit.report.study_reading import StudyReading, estimate, html_table

Json = Mapping[str, Any]

SAID = {  # what each row of the tables is
    "quantized": "post-training quantization, where all training starts",
    **{name: arm.summary for name, arm in ARMS.items()},
}


def arms_of(facts: Json) -> list[str]:
    """The arms in the order they were trained, after the untrained start."""
    found = [label.rpartition(" ")[0] for label in facts["scores"]["rows"] if " " in label]
    return list(dict.fromkeys(found))


def accuracy(facts: Json) -> tuple[list[str], list[list[str]]]:
    """Question 1: F1 of every arm at every preset."""
    rows, presets = facts["scores"]["rows"], facts["presets"]
    table = [["float", *[estimate(rows["float"]["f1"])] * len(presets)]]
    for arm in arms_of(facts):
        table.append([arm, *(estimate(rows[f"{arm} {name}"]["f1"]) for name in presets)])
    return ["F1, %", *(f"{name} = {spelled}" for name, spelled in presets.items())], table


def beats(facts: Json, arm: str, other: str) -> str:
    """One sentence: at which presets an arm is surely better or worse than another."""
    better, worse = [], []
    for name in facts["presets"]:
        row = facts["scores"]["rows"].get(f"{arm} {name}", {}).get(f"f1 over {other}")
        if row and row["low"] > 0:
            better.append(name)
        elif row and row["high"] < 0:
            worse.append(name)
    parts = [f"better at {', '.join(better)}"] * bool(better) + [f"worse at {', '.join(worse)}"] * bool(worse)
    return f"{arm} against {other}: {' and '.join(parts) or 'no difference the intervals would show'}."


def operands(facts: Json) -> str:
    """Weights or activations: harm of the crossed precisions at equal bit operations."""
    uniform = {p["name"]: p["harm"] for p in facts["frontier"]["points"] if p["name"]}
    said = []
    for wide, narrow in ((8, 4), (8, 6), (6, 4), (8, 3)):
        one, other = f"w{narrow}a{wide}", f"w{wide}a{narrow}"
        if one in uniform and other in uniform:
            more = "activations" if uniform[other] > uniform[one] else "weights"
            said.append(f"{one} {uniform[one]:.3g}, {other} {uniform[other]:.3g}: {more} are the more sensitive")
    return "KL in nats at equal bit operations: " + ("; ".join(said) + "." if said else "no crossed pair was measured.")


def cheapest(facts: Json) -> str:
    """How much the frontier saves over uniform precisions at the same harm."""
    points = facts["frontier"]["points"]
    said = []
    for point in points:
        if point["name"] and not point["best"]:
            as_good = [p["cost"] for p in points if p["harm"] <= point["harm"]]
            said.append(f"{1 - min(as_good) / point['cost']:.0%} below uniform {point['name']}")
    return "Bit operations at no more harm: " + (
        ", ".join(said) + "." if said else "no uniform precision is dominated."
    )


def directions(facts: Json) -> list[str]:
    """What the numbers leave open, said from the numbers."""
    found = [beats(facts, arm, "cdt") for arm in arms_of(facts) if arm not in ("cdt", "quantized")]
    undecided = [line.split(" against")[0] for line in found if "no difference" in line]
    lines = []
    if undecided:
        lines.append(f"More questions or seeds are needed to rank {', '.join(undecided)} against cdt.")
    if facts["attack"]:
        lines.append(facts["attack"]["verdict"])
    predicted = [p for p in facts["frontier"]["points"] if p["predicted"] > 0]
    if predicted:
        worst = max(p["harm"] / p["predicted"] for p in predicted)
        lines.append(
            f"Harms of single layers, added up, are wrong by up to {worst:.1f} times: allocate on measured plans."
        )
    return lines or ["The numbers leave no question open at this size."]


def sections(facts: Json) -> list[tuple[str, str, list[str]]]:
    """(title, HTML, sentences) of the six answers."""
    header, table = accuracy(facts)
    trained = [arm for arm in arms_of(facts) if arm != "quantized"]
    cyclic = [beats(facts, arm, "cdt") for arm in ("cyclic", "random") if arm in trained]
    figure = frontier_figure(facts["frontier"]["points"], "bit operations per token", "KL to the float model, nats")
    objectives = [beats(facts, arm, "cdt") for arm in trained if arm not in ("cdt", "cyclic", "random")]
    trade = [*against_independent(facts), *objectives]
    heat = heat_map(facts["attack"]) if facts["attack"] else ""
    gap = [transfer(facts["attack"]), facts["attack"]["verdict"]] if facts["attack"] else ["No attack was run."]
    return [
        ("1. What accuracy do the presets reach?", html_table(header, table), [beats(facts, "cdt", "quantized")]),
        ("2. Which precision for which layer?", pictured(figure), [cheapest(facts), operands(facts)]),
        ("3. Which objective makes one model good at all of them?", html_table(*objective_table(facts)), trade),
        ("4. Does cycling the precision help, as in CPT?", "", cyclic or ["No cyclic run was asked for."]),
        ("5. Do attacks transfer, and does random precision defend, as in Double-Win Quant?", heat, gap),
        ("6. What is open?", "", directions(facts)),
    ]


def transfer(attack: Json) -> str:
    """Whether an attack made at one width works less at others."""
    gap = attack["transfer"]["difference"]
    sure = "attacks transfer poorly" if gap["low"] > 0 else "that attacks transfer poorly is not shown"
    return f"Answers right at other widths than the attacked one, minus at it: {estimate(gap)} points: {sure}."


def against_independent(facts: Json) -> list[str]:
    """What one model for all presets gives up against one for each, and the time it saves."""
    rows, said = facts["scores"]["rows"], []
    arms = [arm for arm in arms_of(facts) if arm not in ("quantized", "independent")]
    alone = {name: rows.get(f"independent {name}") for name in facts["presets"]}
    time = mean_seconds(facts, "independent")
    if not time or not all(row and row["f1"]["value"] for row in alone.values()):
        return []
    for arm in arms:
        share = min(rows[f"{arm} {name}"]["f1"]["value"] / row["f1"]["value"] for name, row in alone.items() if row)
        said.append(f"{arm} {share:.1%} in {mean_seconds(facts, arm) / time:.2f} times")
    return [
        f"Share of the F1 of models trained for one preset each (worst preset), and of their time: {'; '.join(said)}."
    ]


def mean_seconds(facts: Json, arm: str) -> float:
    """Seconds of training of an arm, mean over seeds; 0 where there is none."""
    found = [value for key, value in facts["seconds"].items() if key.rpartition("-")[0] == arm]
    return sum(found) / len(found) if found else 0.0


def objective_table(facts: Json) -> tuple[list[str], list[list[str]]]:
    """Question 3: held-out loss before and at the end of training, mean over seeds, and seconds of training."""
    presets = list(facts["presets"])
    table: list[list[str]] = []
    for arm in [arm for arm in arms_of(facts) if arm != "quantized"]:
        runs = [loss for key, loss in facts["loss"].items() if key.rpartition("-")[0] == arm]
        at = lambda when: [f"{sum(run[p][when]['nll'] for run in runs) / len(runs):.4f}" for p in presets]  # noqa: B023, E731
        if not table:
            table.append(["quantized", *at("start"), ""])
        table.append([arm, *at("end"), f"{mean_seconds(facts, arm):.0f}"])
    return ["nats per token, held out", *presets, "seconds of training"], table


def reading(facts: Json) -> StudyReading:
    """The page of a study."""
    scores = facts["scores"]
    intro = [
        f"{scores['questions']} questions, {scores['seeds']} seed(s) of training; "
        "brackets are 95 % bootstrap intervals over questions, differences are paired. "
        "Predictions were frozen before an answer was read."
    ]
    settings = facts.get("config", {})
    if settings:
        chosen = "{steps} steps of {batch} rows at {learning_rate}, scales per {group_size} weights (0 = per row)"
        intro.append(f"{chosen.format(**settings)}; attacked and searched is the cdt model.")
    intro.append("; ".join(f"{arm}: {SAID[arm]}" for arm in arms_of(facts) if arm in SAID) + ".")
    return StudyReading(f"Switchable {short_name(facts['model'])}", intro, accuracy(facts), sections(facts))
