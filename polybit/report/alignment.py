"""Alignment on a page: before and after in one table, margins and flips, judged answers, the course of the training.

Shapes follow tables 1 to 4 and figure 3 of QDPO (arXiv 2407.03051), for the user's own model. Every part comes from the
JSON of one verb - `polybit eval`, `polybit judge`, `polybit align` - and is left out where its JSON was not given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polybit.core.runtime import PolybitError
from polybit.report import judged, plots, suites
from polybit.report.columns import cells, float_cells, headings
from polybit.report.html import answers, plain_row
from polybit.report.tables import estimate, number, percent, percentage

Json = Mapping[str, Any]
PALETTE = ("#e76f51", "#33658a", "#2a9d8f", "#d4a017", "#b5179e", "#8ab17d")  # rows of the tables, in their order
BAR_TEXT = "Share of answers that won, tied and lost; a tie stays in the denominator, as in the published lose-rate."


@dataclass(frozen=True, slots=True)
class PagePart:
    """A heading with text, tables (caption, header, rows), figures as SVG, and answers side by side."""

    title: str
    text: str = ""
    tables: Sequence[judged.Table] = ()
    figures: Sequence[str] = ()
    talks: Sequence[Json] = field(default=())


def merge(runs: Mapping[str, Json]) -> dict[str, Json]:
    """The rows of several `polybit eval` runs of one float model on one text, by name; the last run is the model's.

    A run with one precision is one row of its name; one with several has a row `NAME w3` for each.
    Raises PolybitError when the runs did not measure the same thing.
    """
    first_name, first = next(iter(runs.items()))
    rows: dict[str, Json] = {}
    for name, run in runs.items():
        numbers = run["numbers"]
        if "text" not in numbers:
            raise PolybitError(f"{name!r} was not measured on text: run `polybit eval` on it with --text or --windows")
        for what, ours, theirs in (
            ("text", numbers["text"], first["numbers"]["text"]),
            ("prompts", numbers["prompts"], first["numbers"]["prompts"]),
            ("float model or text", floats(numbers), floats(first["numbers"])),
        ):
            if ours != theirs:
                raise PolybitError(
                    f"{name!r} and {first_name!r} were measured with another {what} ({ours} and {theirs}): run "
                    "`polybit eval` on both with the same --reference, --text, --windows, --answers and --max-tokens"
                )
        presets = numbers["presets"]
        for preset, row in presets.items():
            label = name if len(presets) == 1 else f"{name} {preset}"
            if label in rows:
                raise PolybitError(f"two rows are called {label!r}: name them, as in --before RTN=eval.json")
            rows[label] = {**row, "run": name, "preset": preset, "choices": choices_of(numbers, preset)}
    return rows


def floats(numbers: Json) -> float:
    """Perplexity of the float model, which two runs on the same text share to six digits."""
    return float(f"{numbers['reference']['perplexity']['value']:.6g}")


def choices_of(numbers: Json, preset: str) -> dict[str, Json]:
    """The first metric of every set with choices, at one precision."""
    found = {}
    for name, entry in numbers.get("choices", {}).items():
        if row := entry["presets"].get(preset):
            found[name] = next(iter(row.values()))
    return found


def parts(runs: Mapping[str, Json], judge: Json | None = None, align: Json | None = None) -> list[PagePart]:
    """All parts there are numbers for; `runs` are `polybit eval` runs by row name, those before first."""
    found = [aligned_part(align["numbers"])] if align else []
    if len(runs) > 1:
        rows = merge(runs)
        found += [compared_part(rows, runs), margin_part(rows), flip_part(rows)]
    for name, run in runs.items():
        tables = [(f"{name}: {t}" if len(runs) > 1 else t, h, r) for t, h, r in suites.tables(run["numbers"])]
        if tables:
            found.append(PagePart("Measured on request" + (f", {name}" if len(runs) > 1 else ""), tables=tables))
    if judge:
        found += judged_parts(judge["numbers"])
    return found


def compared_part(rows: Mapping[str, Json], runs: Mapping[str, Json]) -> PagePart:
    """Table 4: closeness, perplexity and every task, a row per model."""
    first = next(iter(runs.values()))["numbers"]
    tasks = list(first["reference"]["tasks"])
    sets = list(dict.fromkeys(name for row in rows.values() for name in row["choices"]))
    header = ["row", "bits/weight", *headings("page", tasks), *sets]
    table = [["float", "", *float_cells(first["reference"], "page", tasks)]]
    table[0] += [percentage(float_choice(runs, name)) for name in sets]
    for name, row in rows.items():
        choices = [percentage(row["choices"].get(name)) for name in sets]
        table.append([name, number(row.get("bits_per_weight")), *cells(row, "page", tasks), *choices])
    text = (
        "The same text and prompts for every row. Brackets are 95 % bootstrap intervals of a row's own mean; intervals "
        "of two rows that overlap can still hide a difference, because both rows read the same text."
    )
    return PagePart("Before and after", text, [("Closeness, perplexity and tasks", header, table)])


def float_choice(runs: Mapping[str, Json], name: str) -> Json | None:
    """The float model's score on a set with choices."""
    for run in runs.values():
        if entry := run["numbers"].get("choices", {}).get(name):
            return next(iter(entry["reference"].values()))
    return None


def margin_part(rows: Mapping[str, Json]) -> PagePart:
    """Figure 3: mean margin between the two likeliest tokens, per text."""
    first = next(iter(rows.values()))["margins"]
    counts = {"float": first["reference"], **{name: row["margins"]["quantized"] for name, row in rows.items()}}
    table = [["float", estimate(first["reference_mean"]), ""]]
    table += [
        [name, estimate(row["margins"]["quantized_mean"]), estimate(row["margins"]["difference"])]
        for name, row in rows.items()
    ]
    text = (
        "Mean difference between the probabilities of the two likeliest tokens, per text. Quantization makes a model "
        "less decided; a row whose margins are wider than the float model's is not closer to it, only more decided."
    )
    figure = plots.histograms(first["edges"], counts, "mean margin of a text", "texts", colours=colours(rows))
    return PagePart("Margins", text, [("Margins", ["row", "mean margin", "difference to float"], table)], [figure])


def flip_part(rows: Mapping[str, Json]) -> PagePart:
    """Flips by the float model's margin, and how long answers stay the same."""
    shades = colours(rows)
    figures = []
    for key, label in (("margin", "margin, thin to wide"), ("entropy", "entropy, low to high")):
        deciles = {name: [cell["value"] for cell in row[f"flips_by_{key}_decile"]] for name, row in rows.items()}
        label = f"decile of the float model's {label}"
        figures.append(plots.curves(deciles, label, "share of tokens that flip", start=1, colours=shades))
    text = "Share of tokens for which a row prefers another one than the float model, by how sure the float model is."
    if alive := {name: row["survival"] for name, row in rows.items() if row["survival"]}:
        figures.append(plots.curves(alive, "tokens", "share still identical", step=True, colours=shades))
        text += " Last: share of greedy answers that are still word for word the float model's after so many tokens."
    return PagePart("Where tokens flip, and how long answers agree", text, figures=figures)


def colours(rows: Mapping[str, Any]) -> dict[str, str]:
    """A colour for every row, the same in all figures."""
    return {name: PALETTE[n % len(PALETTE)] for n, name in enumerate(rows)}


def aligned_part(numbers: Json) -> PagePart:
    """Each width at the start and at the moment that was kept, and the course of both."""
    table = []
    for preset, row in numbers["presets"].items():
        before, after = row["before"], row["after"]
        flips = [percent(before["flips"]), percent(after["flips"]), fewer(before["flips"], after["flips"])]
        table.append([preset, *flips, number(before["kl"]), number(after["kl"]), fewer(before["kl"], after["kl"])])
    header = ["width", "flips, start", "kept", "change", "KL in nats, start", "kept", "change"]
    lines = {
        f"{preset}, {title}": [
            (entry["step"], entry["presets"][preset][key] / max(numbers["presets"][preset]["before"][key], 1e-12))
            for entry in numbers["history"]
        ]
        for preset in numbers["presets"]
        for key, title in (("flips", "flips"), ("kl", "KL"))
    }
    prompts = numbers["prompts"]
    text = (
        f"Trained on {prompts['train']:,} prompts; these numbers are of the {prompts['held_out']:,} held-out prompts "
        f"the moment was chosen on: {numbers['kept']}. They are therefore a little flattering; the tables of "
        "`polybit eval` are not."
    )
    figure = plots.lines_over(lines, "step", "relative to the start") if len(numbers["history"]) > 1 else None
    return PagePart("The training", text, [("Held-out prompts", header, table)], [figure] if figure else [])


def fewer(before: float, after: float) -> str:
    """A relative change, as in -63 %."""
    return f"{100 * (after / before - 1):+.0f} %" if before > 0 else "–"


def judged_parts(numbers: Json) -> list[PagePart]:
    """Tables 1 to 3 with their bars; the offline fidelity beside them; answers side by side."""
    found = []
    tables = judged.tables(numbers)
    asked = [table for table in tables if not table[0].startswith("Fidelity")]
    offline = [table for table in tables if table[0].startswith("Fidelity")]
    for title, chosen, key in (("Judged answers", asked, "pair"), ("Fidelity of the answers", offline, "fidelity")):
        bars = {name: row[key] for name, row in numbers["rows"].items() if row.get(key) and row[key].get("win")}
        figures = [plots.outcome_bars({name: outcome(row) for name, row in bars.items()})] if bars else []
        if chosen:
            found.append(PagePart(title, judged_text(numbers, key) + (" " + BAR_TEXT if bars else ""), chosen, figures))
    if numbers.get("samples"):
        text = "The same questions to every row; the first word that differs from the float model's answer is marked."
        found.append(PagePart("Conversations side by side", text, talks=talks(numbers["samples"])))
    return found


def judged_text(numbers: Json, key: str) -> str:
    """Who judged what."""
    questions = numbers["questions"]["n"]
    if key == "fidelity":
        return (
            f"{questions} questions. Offline and deterministic: of two answers the one closer to the float model's own "
            "wins. It says nothing about quality."
        )
    return f"{questions} questions. Pairs are judged in both orders and count as won only when both verdicts agree."


def outcome(row: Json) -> tuple[float, float, float]:
    """Win, tie and lose as shares."""
    return row["win"]["value"], row["tie"]["value"], row["lose"]["value"]


def talks(samples: Sequence[Json], most: int = 5) -> list[Json]:
    """Questions with every row's answer, turn by turn."""
    found: list[Json] = []
    for sample in samples[:most]:
        given = sample["answers"]
        own = given.get("float", next(iter(given.values())))
        for turn, question in enumerate(sample["turns"]):
            rows = [
                marked(name, own[turn], texts[turn])
                for name, texts in given.items()
                if turn < min(len(texts), len(own))
            ]
            if rows:
                found.append({"prompt": question.strip(), "rows": rows})
    return found


def marked(name: str, reference: str, text: str) -> dict[str, Any]:
    """An answer cut at its first word that differs from the reference's."""
    wanted, said = (re.findall(r"\s*\w+|\s*[^\w\s]", each.strip()) for each in (reference, text))
    if wanted == said:
        return plain_row(name, text.strip() or "(no answer)")
    at = next((n for n, (a, b) in enumerate(zip(wanted, said, strict=False)) if a != b), min(len(wanted), len(said)))
    flipped = said[at] if at < len(said) else " (ends here)"
    word = flipped.lstrip()
    before = "".join(said[:at]) + flipped[: len(flipped) - len(word)]
    return {"name": name, "before": before, "flipped": word, "after": "".join(said[at + 1 :])}


def side_by_side(runs: Mapping[str, Json]) -> list[dict[str, Any]]:
    """Greedy answers of every row of every run to the same prompts."""
    return answers({"presets": merge(runs)})
