"""Speed as people read it: one table for the terminal, one figure of tokens per second and bytes against bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polybit.report.plots import figure, svg
from polybit.report.tables import number, size

MARKS = {"polybit": ("o", "#33658a"), "llama.cpp": ("s", "#e76f51"), "torch": ("^", "#555555")}


def table(rows: Sequence[Mapping[str, Any]], title: str, unit: str) -> Any:
    """A rich table; `unit` is what is counted per second ("tokens"), or empty for the time of one call."""
    from rich.table import Table

    drawn = Table(title=title, title_justify="left")
    drawn.add_column("", no_wrap=True)
    heads = ["bits/weight", "bytes", f"{unit}/s" if unit else "µs", "p20", "p80", "GB/s", "of the probe"]
    peak = any(row.get("of_int8_peak") for row in rows) and not unit
    eager = any(row.get("eager_seconds") for row in rows)
    extra = [*(["of int8 peak"] if peak else []), *(["called from Python, µs"] if eager else [])]
    for head in [*heads, *extra, "against"]:
        drawn.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        drawn.add_row(row["name"], *cells(row, unit, peak=peak, eager=eager))
    return drawn


def cells(row: Mapping[str, Any], unit: str, *, peak: bool, eager: bool) -> list[str]:
    """The numbers of one row."""
    scale = row["per_second"] * row["seconds"]
    if unit:
        speeds = [scale / row[key] for key in ("seconds", "p80", "p20")]
    else:
        speeds = [1e6 * row[key] for key in ("seconds", "p20", "p80")]
    share = row["paired_share"]
    found = [number(row["bits"], 4), size(row["bytes"] / scale) if row["bytes"] else "", *(number(v) for v in speeds)]
    found += [number(row["gigabytes_per_second"]) if share else "", f"{share:.0%}" if share else ""]
    if peak:
        found.append(f"{row['of_int8_peak']:.0%}" if row.get("of_int8_peak") else "")
    if eager:
        found.append(number(1e6 * row["eager_seconds"]))
    ratio = row.get("ratio")
    return [*found, f"{ratio['median']:.2f} x {ratio['of']}" if ratio else ""]


def speed_against_bits(rows: Sequence[Mapping[str, Any]], unit: str) -> str:
    """Tokens (or calls) per second against bits per weight, and bytes read for each, as SVG text."""
    drawn, axes = figure(7.2, 3.6)
    other = axes.twinx()
    other.grid(visible=False)
    for engine, (mark, colour) in MARKS.items():
        points = sorted((r["bits"], r["per_second"], r["bytes"] / (r["per_second"] * r["seconds"]), r["name"])
                        for r in rows if r["engine"] == engine and r["bytes"])  # fmt: skip
        if not points:
            continue
        axes.plot([p[0] for p in points], [p[1] for p in points], mark, color=colour, label=engine)
        if engine == "polybit":
            best = {p[0]: p[1] for p in points}  # the fastest of every width, since points are in ascending order
            axes.plot(list(best), list(best.values()), "-", color=colour, linewidth=1)
        other.plot(
            [p[0] for p in points], [p[2] / 1e6 for p in points], mark, color=colour, fillstyle="none", alpha=0.5
        )
        for bits, speed, _, name in points:
            text = name.removeprefix(engine).strip()
            axes.annotate(text, (bits, speed), (4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel("bits per weight, scales counted")
    axes.set_ylabel(f"{unit} per second (filled)")
    other.set_ylabel("megabytes read each (hollow)")
    axes.set_ylim(bottom=0)
    other.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return svg(drawn)
