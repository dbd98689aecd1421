"""Figures as SVG text, for one self-contained page; matplotlib enters by this door only."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from polybit.core.runtime import PolybitError

# One colour per width, from wide (calm) to narrow (warm); readable in print and by colour-blind eyes.
COLOURS = {"w8": "#33658a", "w7": "#3f7cac", "w6": "#2a9d8f", "w5": "#8ab17d", "w4": "#d4a017", "w3": "#e76f51"}
NARROWEST, OTHER = "#b5179e", "#555555"


def colour(preset: str) -> str:
    """Colour of a preset's line."""
    return NARROWEST if preset == "w2" else COLOURS.get(preset, OTHER)


def figure(width: float = 6.2, height: float = 3.4):
    """A matplotlib figure without a window system: (figure, axes)."""
    try:
        import matplotlib
    except ImportError as error:
        raise PolybitError("figures need matplotlib: run pip install 'polybit[report]'") from error
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "polybit",  # the same numbers give the same bytes
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
        }
    )
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), layout="constrained")
    return drawn, drawn.subplots()


def svg(drawn) -> str:
    """The figure as an <svg> element that scales with the page."""
    buffer = io.StringIO()
    drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    element = buffer.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", element, count=1)


def quality_against_bits(points: Sequence[Mapping[str, Any]]) -> str:
    """Mean KL (log scale, with intervals) against effective bits per weight; points: {preset, bits, kl}."""
    drawn, axes = figure()
    shown = sorted((p for p in points if p["kl"]["value"] > 0), key=lambda p: p["bits"])
    if shown:
        bits = [p["bits"] for p in shown]
        values = [p["kl"]["value"] for p in shown]
        below = [max(p["kl"]["value"] - p["kl"]["low"], 0) for p in shown]
        above = [max(p["kl"]["high"] - p["kl"]["value"], 0) for p in shown]
        axes.errorbar(bits, values, yerr=[below, above], color=OTHER, marker="o", capsize=3, linewidth=1.4)
        axes.set_yscale("log")
        for point in shown:
            axes.annotate(point["preset"], (point["bits"], point["kl"]["value"]), (5, 5), textcoords="offset points")
    axes.set_xlabel("effective bits per weight (scales and zeros counted)")
    axes.set_ylabel("mean KL to the float model, nats")
    return svg(drawn)


def scores_against_bits(
    scores: Mapping[str, Sequence[tuple[float, float, float, float]]], floats: Mapping[str, float]
) -> str:
    """Task scores with intervals against bits: task -> (bits, value, low, high); dashed = the float model."""
    drawn, axes = figure()
    for number, (task, points) in enumerate(scores.items()):
        shown = sorted(points)
        line = axes.errorbar(
            [p[0] for p in shown],
            [100 * p[1] for p in shown],
            yerr=[[100 * max(p[1] - p[2], 0) for p in shown], [100 * max(p[3] - p[1], 0) for p in shown]],
            marker="os^vD"[number % 5],
            capsize=3,
            label=task,
        )
        if task in floats:
            axes.axhline(100 * floats[task], color=line[0].get_color(), linestyle="--", linewidth=0.8)
    axes.set_ylim(0, 102)
    axes.set_xlabel("effective bits per weight")
    axes.set_ylabel("score, % (dashed: float)")
    if scores:
        axes.legend(frameon=False)
    return svg(drawn)


def curves(
    lines: Mapping[str, Sequence[float]],
    xlabel: str,
    ylabel: str,
    *,
    start: int = 0,
    step: bool = False,
    colours: Mapping[str, str] | None = None,
) -> str:
    """One line per preset over equally spaced positions; `colours` where the names are no presets."""
    drawn, axes = figure()
    for preset, values in lines.items():
        positions = range(start, start + len(values))
        draw = axes.step if step else axes.plot
        draw(
            positions,
            values,
            color=(colours or {}).get(preset, colour(preset)),
            label=preset,
            marker=None if len(values) > 20 else "o",
            markersize=3,
        )
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_ylim(bottom=0)
    if lines:
        axes.legend(frameon=False, ncols=2)
    return svg(drawn)


def histograms(
    edges: Sequence[float],
    counts: Mapping[str, Sequence[float]],
    xlabel: str,
    ylabel: str,
    *,
    colours: Mapping[str, str] | None = None,
) -> str:
    """Outlined histograms on shared edges; the float model is drawn filled."""
    drawn, axes = figure()
    for preset, values in counts.items():
        filled = preset == "float"
        shade = "#bbbbbb" if filled else (colours or {}).get(preset, colour(preset))
        axes.stairs(values, edges, color=shade, fill=filled, label=preset, linewidth=1.3)
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.legend(frameon=False, ncols=2)
    return svg(drawn)


def outcome_bars(rows: Mapping[str, tuple[float, float, float]]) -> str:
    """Win, tie and lose of every row as one bar of 100 %; the shares stand in the bar where there is room."""
    drawn, axes = figure(6.2, max(2.2, 0.42 * len(rows) + 1.1))
    names = list(rows)
    before = [0.0] * len(names)
    for place, (label, shade) in enumerate((("win", "#2a9d8f"), ("tie", "#c9c9c9"), ("lose", "#e76f51"))):
        shares = [100 * rows[name][place] for name in names]
        axes.barh(names, shares, left=before, color=shade, label=label, height=0.62)
        for y, (share, left) in enumerate(zip(shares, before, strict=True)):
            if share >= 6:
                axes.text(left + share / 2, y, f"{share:.0f}", ha="center", va="center", fontsize=8)
        before = [left + share for left, share in zip(before, shares, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of answers, %")
    axes.grid(visible=False)
    if rows:
        axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return svg(drawn)


def layer_bytes(rows: Sequence[tuple[str, Mapping[str, int]]]) -> str:
    """Bytes read per layer, stacked by preset, the lightest first: the bar up to `w3` is what a 3-bit pass reads."""
    drawn, axes = figure(6.2, max(2.0, 0.22 * len(rows) + 0.9))
    names = [name for name, _ in rows]
    presets = sorted({p for _, read in rows for p in read}, key=lambda p: (sum(read.get(p, 0) for _, read in rows), p))
    before = [0.0] * len(rows)
    for preset in presets:
        reach = [widths.get(preset, 0) / 1024 for _, widths in rows]
        added = [max(r - b, 0) for r, b in zip(reach, before, strict=True)]
        axes.barh(names, added, left=before, color=colour(preset), label=preset)
        before = [max(r, b) for r, b in zip(reach, before, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("KiB read per token")
    axes.tick_params(axis="y", labelsize=7)
    if presets:
        axes.legend(frameon=False, ncols=len(presets), fontsize=7, loc="lower right")
    return svg(drawn)


def bit_map(rows: Sequence[Sequence[int | None]], names: Sequence[str], columns: Sequence[str]) -> str:
    """The width of every layer as a coloured table: one row per decoder block, one column per kind of layer."""
    drawn, axes = figure(6.2, max(1.6, 0.32 * len(rows) + 1.1))
    for y, row in enumerate(rows):
        for x, width in enumerate(row):
            if width is not None:
                axes.add_patch(plain_square(x, y, colour(f"w{width}")))
                axes.text(x, y, str(width), ha="center", va="center", color="white", fontsize=8)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.grid(visible=False)
    return svg(drawn)


def plain_square(x: float, y: float, fill: str):
    """A filled square of one table cell."""
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=fill, edgecolor="none")


def layer_signals(
    names: Sequence[str], signals: Mapping[str, Sequence[tuple[float, float, float]]], xlabel: str
) -> str:
    """Sensitivities per layer with intervals, one marker per signal: (value, low, high) per layer; log scale."""
    drawn, axes = figure(6.2, max(2.2, 0.2 * len(names) + 1.0))
    for number, (signal, points) in enumerate(signals.items()):
        places = [at + 0.3 * (number - (len(signals) - 1) / 2) / max(len(signals), 1) for at in range(len(points))]
        values = [max(p[0], 1e-9) for p in points]
        spread = [
            [max(v - max(p[1], 1e-9), 0) for v, p in zip(values, points, strict=True)],
            [max(p[2] - v, 0) for v, p in zip(values, points, strict=True)],
        ]
        axes.errorbar(values, places, xerr=spread, fmt="os^vD"[number % 5], markersize=3, linewidth=0.8, label=signal)
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel(xlabel)
    if signals:
        axes.legend(frameon=False, fontsize=7)
    return svg(drawn)


def lines_over(
    lines: Mapping[str, Sequence[tuple[float, float]]], xlabel: str, ylabel: str, *, log: bool = False, **marks: Any
) -> str:
    """Lines through (x, y) points by name; `marks` maps a label to one point that is drawn as a star."""
    drawn, axes = figure()
    for number, (name, points) in enumerate(lines.items()):
        shown = sorted(points)
        axes.plot([p[0] for p in shown], [p[1] for p in shown], marker="os^vD"[number % 5], markersize=4, label=name)
    for label, point in marks.items():
        axes.plot([point[0]], [point[1]], marker="*", markersize=13, color=NARROWEST, label=label.replace("_", " "))
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    if lines:
        axes.legend(frameon=False)
    return svg(drawn)


def dots(points: Sequence[tuple[str, float, Mapping[str, float]]], across: str, up: str) -> str:
    """Named points (label, x, y with its interval), and a line at zero."""
    drawn, axes = figure()
    axes.axhline(0, color=OTHER, linewidth=0.8, linestyle="--")
    for label, x, y in points:
        error = [[max(y["value"] - y["low"], 0)], [max(y["high"] - y["value"], 0)]]
        axes.errorbar([x], [y["value"]], yerr=error, color=COLOURS["w8"], marker="o", capsize=3)
        axes.annotate(label, (x, y["value"]), (5, 5), textcoords="offset points", fontsize=7)
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    return svg(drawn)
