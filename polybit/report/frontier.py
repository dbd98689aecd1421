"""The frontier of harm against cost as a figure and a table; dominated choices are drawn in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polybit.report.plots import figure, svg

MARKS = {
    "exact": ("s", "#33658a"),
    "greedy": ("^", "#2a9d8f"),
    "evolved": ("o", "#e76f51"),
    "uniform": ("D", "#b5179e"),
}
GREY = "#c4c4c4"


def frontier_figure(points: Sequence[Mapping[str, Any]], cost: str, harm: str) -> str:
    """Measured choices as SVG; points: {cost, harm, found_by, best (not dominated), name (a label, or empty)}."""
    drawn, axes = figure()
    dominated = [p for p in points if not p["best"]]
    axes.scatter([p["cost"] for p in dominated], [p["harm"] for p in dominated], s=14, color=GREY, label="dominated")
    best = sorted((p for p in points if p["best"]), key=lambda p: p["cost"])
    axes.step([p["cost"] for p in best], [p["harm"] for p in best], where="post", color="#555555", linewidth=1.0)
    for found_by in sorted({p["found_by"] for p in best}):
        mark, colour = MARKS.get(found_by, ("o", "#555555"))
        ours = [p for p in best if p["found_by"] == found_by]
        xs, ys = [p["cost"] for p in ours], [p["harm"] for p in ours]
        axes.scatter(xs, ys, s=26, marker=mark, color=colour, label=found_by, zorder=3)
    for point in points:
        if point["name"]:
            axes.annotate(point["name"], (point["cost"], point["harm"]), (5, 4), textcoords="offset points", fontsize=7)
    if all(p["harm"] > 0 for p in points):
        axes.set_yscale("log")
    axes.set_xlabel(cost)
    axes.set_ylabel(harm)
    axes.legend(frameon=False, fontsize=7)
    return svg(drawn)


def frontier_rows(points: Sequence[Mapping[str, Any]], cost: str) -> str:
    """The best choices as a Markdown table, cheapest first."""
    best = sorted((p for p in points if p["best"]), key=lambda p: p["cost"])
    lines = [f"| {cost} | mean weight bits | measured harm | found by |", "|---|---|---|---|"]
    lines += [f"| {p['cost']:.4g} | {p['bits']:.2f} | {p['harm']:.4g} | {p['name'] or p['found_by']} |" for p in best]
    return "\n".join(lines) + "\n"
