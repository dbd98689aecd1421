"""The page of an allocation: bit map of the model, sensitivities, mixture curve, front of loss against bits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from polybit.report import plots
from polybit.report.html import machine_text
from polybit.report.tables import aligned, estimate, number

Json = Mapping[str, Any]
SHOWN = "3"  # width at which sensitivities are drawn, where it was measured


def page(allocation: Json, mixture: Json | None = None) -> str:
    """The whole page as HTML text without any link outwards.

    allocation: run.json of the verb allocate · mixture: run.json of the verb mix, for the curve of the mixture search.
    """
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(
        (files("polybit.report") / "page.html.j2").read_text(encoding="utf-8")
    )
    numbers = allocation["numbers"]
    return template.render(
        title=f"{allocation['config']['model']}: {number(numbers['bits_per_weight'], 4)} bits per weight",
        subtitle=f"group size {numbers['group_size'] or 'row'} · tasks: {', '.join(numbers['tasks']) or 'none'} · "
        f"general text: {', '.join(numbers['general'])}",
        verdict=verdict(numbers),
        table=proof_table(numbers),
        sections=[part for part in sections(numbers, mixture) if part["figures"]],
        answers=[],
        leftovers=[],
        method=METHOD,
        commands=[],
        machine=machine_text(allocation),
    )


def told(numbers: Json) -> str:
    """The plan in a few lines, and its proof."""
    counts = ", ".join(f"{count} at {width}" for width, count in sorted(numbers["layers_by_width"].items()))
    lines = [f"{numbers['bits_per_weight']:.3f} effective bits per weight; layers: {counts} bits"]
    for label, agreement in numbers["agreement"].items():
        halves = ", ".join(f"{k} {'' if v is None else f'{v:.2f}'}" for k, v in agreement["reliability"].items())
        lines.append(f"Kendall's tau {label}: {estimate(agreement['tau'])} (each with itself, by halves: {halves})")
    rows = [
        [row["name"], f"{row['bits']:.3f}", *(number(kl["value"]) for kl in row["kl"].values()), number(row["score"])]
        for row in numbers["proof"]["rows"]
    ]
    probes = list(numbers["proof"]["rows"][0]["kl"])
    lines.append(aligned(["on held-out text", "bits/weight", *(f"KL {p}" for p in probes), "weighted"], rows))
    return "\n".join(lines)


def warned(numbers: Json) -> str:
    """What is to be said against a plan that is no better than even bits; empty for a better one."""
    proof = numbers["proof"]
    if proof["better_than_uniform"]:
        return ""
    return (
        "this plan is NOT better than spending the bits evenly "
        f"({number(proof['score'])} against {number(proof['uniform_score'])}): use a uniform width, or read the "
        "sensitivities on more text (--samples, --items)"
    )


METHOD = (
    "Each layer was quantized by itself at every width and the divergence from the float model read on each text; the "
    "assignment with the least weighted harm within the budget is exact (a 0-1 programme). It was then improved by "
    "measuring whole plans, and proved on windows and questions nothing was decided on. Effective bits count codes, "
    "scales and zero points."
)


def verdict(numbers: Json) -> str:
    """Whether it paid."""
    proof = numbers["proof"]
    found, line = proof["score"], proof["uniform_score"]
    if not proof["better_than_uniform"]:
        return (
            f"This plan is not better than spending the same bits evenly: {number(found)} against {number(line)} "
            "(weighted KL on held-out text). Use a uniform width."
        )
    return (
        f"On held-out text the plan costs {number(found)} where the same bits spent evenly cost {number(line)} "
        f"(weighted KL, relative to a uniform plan): {100 * (1 - found / line):.0f} % less."
    )


def proof_table(numbers: Json) -> dict[str, Any]:
    """The plan against uniform widths."""
    rows = numbers["proof"]["rows"]
    probes = list(rows[0]["kl"])
    return {
        "header": ["plan", "bits/weight", *(f"KL {probe}, nats" for probe in probes), "weighted"],
        "rows": [
            [row["name"], f"{row['bits']:.3f}", *(estimate(row["kl"][probe]) for probe in probes), number(row["score"])]
            for row in rows
        ],
        "note": "Brackets are 95 % bootstrap intervals over items. Codes as the sensitivities were measured with; "
        "quantize --plan with learned rounding does better at every width.",
    }


def sections(numbers: Json, mixture: Json | None) -> list[dict[str, Any]]:
    """Title, one sentence, figures."""
    layers = numbers["layers"]
    uniform = [(row["bits"], row["score"]) for row in numbers["proof"]["rows"][1:]]
    front = [(row["bits"], row["score"]) for row in numbers["front"]]
    ours = numbers["proof"]["rows"][0]
    losses = list(next(iter(next(iter(layers.values()))["sensitivity"].values())))
    parts = [
        {"title": "Where the bits go", "text": MAP_TEXT, "figures": [bit_map(layers)]},
        {
            "title": "Sensitivities",
            "text": agreement_text(numbers["agreement"]),
            "figures": [sensitivities(layers, loss) for loss in losses],
        },
        {
            "title": "Loss against bits",
            "text": "Solved plans at several budgets and uniform widths, all measured on held-out text.",
            "figures": [
                plots.lines_over(
                    {"allocated": front, "uniform": uniform},
                    "effective bits per weight",
                    "weighted KL",
                    log=True,
                    this_plan=(ours["bits"], ours["score"]),
                )
            ],
        },
    ]
    if mixture is not None:
        parts.append(mixture_section(mixture["numbers"]["mixture"]))
    return parts


MAP_TEXT = "One row per decoder block, one column per kind of layer; the number is the layer's width in bits."


def short(layer: str) -> tuple[str, str]:
    """A layer's name as (block, kind): model.layers.3.mlp.up_proj is ("3", "mlp.up_proj")."""
    found = re.search(r"\.(\d+)\.", layer)
    return (found.group(1), layer[found.end() :]) if found else ("", layer)


def bit_map(layers: Json) -> str:
    """Widths by block and kind."""
    kinds = list(dict.fromkeys(short(name)[1] for name in layers))
    blocks = list(dict.fromkeys(short(name)[0] for name in layers))
    cells = {short(name): row["width"] for name, row in layers.items()}
    return plots.bit_map([[cells.get((block, kind)) for kind in kinds] for block in blocks], blocks, kinds)


def sensitivities(layers: Json, loss: str) -> str:
    """Each layer's harm at one width by every signal."""
    first = next(iter(layers.values()))["sensitivity"]
    widths = next(iter(first.values()))["kl"]
    width = SHOWN if SHOWN in widths else next(iter(widths))
    signals = {
        probe: [
            (e["value"], e["low"], e["high"])
            for e in (row["sensitivity"][probe][loss][width] for row in layers.values())
        ]
        for probe in first
    }
    what = "KL to the float model" if loss == "kl" else "rise of the loss"
    return plots.layer_signals(
        [".".join(filter(None, short(name))) for name in layers], signals, f"{what}, nats per token, at {width} bits"
    )


def agreement_text(agreement: Json) -> str:
    """Kendall's tau in words."""
    if not agreement:
        return "What quantizing each layer alone costs; intervals are 95 %, items resampled."
    told = []
    for label, row in agreement.items():
        halves = ", ".join(f"{name} {value:.2f}" for name, value in row["reliability"].items() if value is not None)
        told.append(f"{label}: {estimate(row['tau'])} (by halves of its items each agrees with itself to {halves})")
    return (
        "What quantizing each layer alone costs. Kendall's tau between the rankings of layers "
        + "; ".join(told)
        + ". A tau near zero means something only where both signals agree with themselves."
    )


def mixture_section(mixture: Json) -> dict[str, Any]:
    """The curve of the mixture search over the share of general text."""
    general = set(mixture["general"])
    curve = [
        (sum(share for source, share in point["weights"].items() if source in general), point["score"])
        for point in mixture["curve"]
    ]
    best = mixture["best"]
    at = sum(share for source, share in best["weights"].items() if source in general)
    figure = plots.lines_over(
        {mixture["criterion"]: curve},
        "share of general text",
        "score",
        best=(at, best["score"]),
    )
    return {
        "title": "Calibration mixture",
        "text": "Score of each mixture of texts, without quantizing.",
        "figures": [figure],
    }
