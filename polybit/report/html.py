"""One self-contained HTML page from the JSON of `polybit eval` and, where there is one, of `polybit quantize`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from polybit.report import plots
from polybit.report.columns import cells, float_cells, headings, task_score
from polybit.report.frame import STYLE
from polybit.report.tables import estimate, number, percent, percentage, size

Json = Mapping[str, Any]


def page(
    evaluation: Json,
    quantization: Json | None = None,
    *,
    parts: Sequence[Any] = (),
    said: Sequence[Json] | None = None,
    others: Sequence[Json] = (),
) -> str:
    """The whole report as HTML text without any link outwards.

    evaluation: run.json of the verb eval · quantization: run.json of the verb quantize, for bytes per layer and what
    stays in float · parts: report.alignment.PagePart, shown after the first table · said: answers side by side
    (default: the evaluation's) · others: further runs, whose commands are shown.
    """
    numbers = evaluation["numbers"]
    has_text = "text" in numbers
    made = (quantization or {}).get("numbers", {})
    return render(
        title=title(evaluation),
        subtitle=subtitle(evaluation, quantization),
        verdict=verdict(numbers) if has_text else "",
        table=cost_table(numbers) if "presets" in numbers else None,
        sections=[
            row
            for row in (sections(numbers, made) if has_text else [])
            if row["figures"] and (said is None or not row.get("compared"))
        ],
        parts=parts,
        answers=answers(numbers) if said is None and has_text else said,
        leftovers=[
            {**row, "share": percent(row["share"]), "parameters": f"{row['parameters']:,}"}
            for row in made.get("left_in_float", [])
        ],
        method=method_text(evaluation) if has_text else "",
        commands=commands_of([quantization, *others, evaluation]),
        machine=machine_text(evaluation),
    )


def parts_page(name: str, parts: Sequence[Any], runs: Sequence[Json]) -> str:
    """A page of parts alone, for a model that was not evaluated."""
    return render(title=name, subtitle="", parts=parts, commands=commands_of(runs), machine=machine_text(runs[-1]))


def render(**context: Any) -> str:
    """The template filled in; what is not given is left out."""
    return template().render(style=STYLE, **context)


@cache
def template() -> Any:
    """The page's template, compiled once."""
    from jinja2 import Environment

    text = (files("polybit.report") / "page.html.j2").read_text(encoding="utf-8")
    return Environment(autoescape=True).from_string(text)


def commands_of(runs: Sequence[Json | None]) -> list[str]:
    """The commands of runs, each once."""
    return list(dict.fromkeys(run["command"] for run in runs if run and run.get("command")))


def title(evaluation: Json) -> str:
    """Name of the checkpoint and at how many precisions it was measured."""
    count = len(evaluation["numbers"].get("presets", ()))
    name = evaluation["config"].get("target_name", "model")
    return f"{name}: one file, {count} precisions" if count > 1 else str(name)


def subtitle(evaluation: Json, quantization: Json | None) -> str:
    """Model, method and when."""
    parts = [f"reference: {evaluation['config'].get('reference_name', 'the float model')}"]
    if quantization:
        config = quantization["config"]
        parts.append(f"method {config.get('method')}, group size {config.get('group_size')}")
    return " · ".join(parts)


def verdict(numbers: Json) -> str:
    """The honest sentence a reader with ten seconds needs."""
    kept = [
        (name, row)
        for name, row in numbers["presets"].items()
        if row["top1"]["value"] >= 0.98 and "bits_per_weight" in row
    ]
    if not kept:
        return (
            "No measured precision agrees with the float model on 98 % of next tokens; the table says how far each is."
        )
    name, row = min(kept, key=lambda item: item[1]["bits_per_weight"])
    return (
        "The narrowest precision whose likeliest next token agrees with the float model's at least 98 % of the time is "
        f"{name}: {number(row['bits_per_weight'])} bits per weight, {percentage(row['top1'])} agreement, "
        f"mean KL {estimate(row['kl'])} nats."
    )


def cost_table(numbers: Json) -> dict[str, Any]:
    """One row per precision, the float model first; columns that nobody fills are left out."""
    reference = numbers["reference"]
    tasks = list(reference["tasks"])
    header = ["precision", "bits/weight", "bytes read", *headings("page", tasks)]
    rows = [["float", "16–32", "", *float_cells(reference, "page", tasks)]]
    for name, row in numbers["presets"].items():
        sizes = [number(row.get("bits_per_weight")), size(row["bytes"]) if "bytes" in row else ""]
        rows.append([name, *sizes, *cells(row, "page", tasks)])
    kept = [n for n in range(len(header)) if any(row[n] for row in rows)]
    note = "Brackets are 95 % bootstrap intervals, paired with the float model. "
    if "text" in numbers:
        text, prompts = numbers["text"], numbers["prompts"]
        note += f"Text: {text['tokens']:,} predicted tokens in {text['windows']} windows. "
        note += f"Prompts answered freely: {prompts['n']}, up to {prompts['max_tokens']} tokens. "
    note += "Bits per weight and bytes count codes, scales, zero points and ratios of the quantized layers."
    return {"header": [header[n] for n in kept], "rows": [[row[n] for n in kept] for row in rows], "note": note}


def sections(numbers: Json, made: Json) -> list[dict[str, Any]]:
    """Title, one sentence, figures."""
    presets = numbers["presets"]
    sized = [
        {"preset": n, "bits": r["bits_per_weight"], "kl": r["kl"]} for n, r in presets.items() if "bits_per_weight" in r
    ]
    quality = [plots.quality_against_bits(sized)] if len(sized) > 1 else []
    scores, floats = score_points(numbers)
    if scores and len(sized) > 1:
        quality.append(plots.scores_against_bits(scores, floats))
    flips = {n: [row["value"] for row in r["flips_by_margin_decile"]] for n, r in presets.items()}
    entropy = {n: [row["value"] for row in r["flips_by_entropy_decile"]] for n, r in presets.items()}
    alive = {n: r["survival"] for n, r in presets.items() if r["survival"]}
    layers = [(name, row["bytes"]) for name, row in made.get("layers", {}).items()]
    return [
        {"title": "Quality against bits", "text": "Lower KL is closer to the float model.", "figures": quality},
        {
            "title": "Where tokens flip",
            "compared": True,  # drawn with the other rows where there are some
            "text": FLIP_TEXT,
            "figures": [
                plots.curves(
                    flips, "decile of the float model's margin, thin to wide", "share of tokens that flip", start=1
                ),
                plots.curves(
                    entropy, "decile of the float model's entropy, low to high", "share of tokens that flip", start=1
                ),
            ],
        },
        {
            "title": "How long answers stay the same",
            "compared": True,
            "text": "Share of greedy answers that are still word for word the float model's after so many tokens.",
            "figures": [plots.curves(alive, "tokens", "share still identical", step=True)] if alive else [],
        },
        {"title": "Margins", "compared": True, "text": MARGIN_TEXT, "figures": margin_figures(presets)},
        {
            "title": "Bytes per layer",
            "text": "One stored weight; a narrower width reads fewer of its planes, up to the end of its colour.",
            "figures": [plots.layer_bytes(layers)] if layers else [],
            "tall": True,
        },
    ]


FLIP_TEXT = (
    "A flip is a token for which the quantized model would choose another one than the float model. Flips sit where "
    "the float model itself hesitates: small margin between its two likeliest tokens, high entropy."
)
MARGIN_TEXT = (
    "Mean difference between the probabilities of the two likeliest tokens, per text. A distribution that moved left "
    "means a less decided model."
)


def score_points(numbers: Json) -> tuple[dict[str, list[tuple[float, float, float, float]]], dict[str, float]]:
    """Task -> (bits, value, low, high) per precision, and the float model's scores."""
    scores: dict[str, list[tuple[float, float, float, float]]] = {}
    floats: dict[str, float] = {}
    for task, row in numbers["reference"]["tasks"].items():
        if (score := task_score(row, task)) is None:
            continue
        floats[task] = score["value"]
        scores[task] = []
        for preset in numbers["presets"].values():
            found = task_score(preset["tasks"].get(task, {}), task)
            if found is not None and "bits_per_weight" in preset:
                scores[task].append((preset["bits_per_weight"], found["value"], found["low"], found["high"]))
    return scores, floats


def margin_figures(presets: Json) -> list[str]:
    """Histograms of the float model's margins and of every precision's, on shared edges."""
    if not presets:
        return []
    first = next(iter(presets.values()))["margins"]
    counts = {"float": first["reference"], **{n: r["margins"]["quantized"] for n, r in presets.items()}}
    return [plots.histograms(first["edges"], counts, "mean margin of a text", "texts")]


def answers(numbers: Json, most: int = 5) -> list[dict[str, Any]]:
    """Prompts with the answer of the float model and of every precision, cut at the first flipped token."""
    found: dict[str, dict[str, Any]] = {}
    for name, row in numbers["presets"].items():
        for answer in row["answers"]:
            entry = found.setdefault(
                answer["prompt"],
                {"prompt": answer["prompt"].strip(), "rows": [plain_row("float", answer["reference"])]},
            )
            entry["rows"].append(answer_row(name, answer))
    ranked = sorted(found.values(), key=lambda entry: -len(entry["rows"]))
    return ranked[:most]


def plain_row(name: str, text: str) -> dict[str, Any]:
    """An answer without a mark."""
    return {"name": name, "before": text.strip(), "flipped": None, "after": ""}


def answer_row(name: str, answer: Json) -> dict[str, Any]:
    """An answer cut into what agrees, the first token that does not, and what followed."""
    at: int | None = answer["first_difference_token"]
    pieces: Sequence[str] = answer["tokens_quantized"]
    if at is None:
        return plain_row(name, answer["quantized"])
    flipped = pieces[at] if at < len(pieces) else "(ends here)"
    return {
        "name": name,
        "before": "".join(pieces[:at]).lstrip(),
        "flipped": flipped.strip() or repr(flipped),
        "after": "".join(pieces[at + 1 :]),
    }


def method_text(evaluation: Json) -> str:
    """What was measured, in words."""
    config = evaluation["config"]
    text = config.get("text_name") or "text"
    return (
        f"Both models read the same windows of {text}; KL, agreement and margins are computed token by token from both "
        "models' full distributions. Answers are greedy. Task answers were generated and sealed (their digest is in "
        "the JSON) before any right answer was read. Nothing was tuned on this text by this command."
    )


def machine_text(evaluation: Json) -> str:
    """Where and how long."""
    machine = evaluation["machine"]
    return (
        f"{machine['processor']}, {machine['threads']} threads, Python {machine['python']}, torch {machine['torch']}; "
        f"{evaluation['seconds']:.0f} s."
    )
