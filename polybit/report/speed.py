"""Speed and cost as people read them: tables for the terminal, a figure of tokens per second and bytes against bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polybit.report.plots import figure, svg
from polybit.report.tables import number, size

MARKS = {"polybit": ("o", "#33658a"), "llama.cpp": ("s", "#e76f51"), "torch": ("^", "#555555")}


def show(what: str, numbers: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Print what `polybit bench` measured and where it kept it; `asked`: its options."""
    from rich.console import Console

    if what == "switch":
        low, middle, high = (1e6 * numbers[key] for key in ("p20", "seconds", "p80"))
        print(f"switching {numbers['layers']} layers takes {middle:.0f} µs (p20 {low:.0f}, p80 {high:.0f})")
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a file has room for every column
    unit = "tokens" if what == "generate" else ""
    title = f"writing, {asked['tokens']} tokens" if unit else f"{asked['shape']}, {asked['batch']} tokens at once"
    where = numbers.get("gpu") or f"{numbers['threads']} threads"
    console.print(table(written(numbers["rows"]), f"{title}, {where}, {asked['rounds']} rounds", unit))
    for note in numbers.get("notes", ()):
        print(note)
    reading = [row for row in numbers["rows"] if "prompt" in row["engine"]]
    if reading:
        console.print(table(reading, f"reading a prompt of {asked['prompt']} tokens", unit))
    if "constants_file" in numbers:
        print(f"kept for `polybit plan`: {numbers['constants_file']}")


def written(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of what is computed token by token, not of a prompt that is read."""
    return [row for row in rows if "prompt" not in row["engine"]]


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


def costs(numbers: Mapping[str, Any]) -> str:
    """What `polybit cost` counted, read and measured, as lines for a terminal."""
    lines = [f"{'':<14}{'BitOPs/token':>16}{'of FP32':>10}{'bytes/token':>14}{'of them cache':>15}{'ms/token':>22}"]
    for name, row in numbers["precisions"].items():
        read = row["bytes_per_token"]
        ms = row["ms_per_token"]
        timed = f"{ms['median']:.2f} ({ms['p10']:.2f}-{ms['p90']:.2f})" if ms else "not measured"
        share = row["bitops_per_token"] / numbers["float_bitops_per_token"]
        lines.append(
            f"{name:<14}{row['bitops_per_token'] / 1e9:>14.3f} G{100 * share:>8.1f} %"
            f"{(read['weights'] + read['cache']) / 1e6:>11.3f} MB{read['cache'] / 1e6:>12.3f} MB{timed:>22}"
        )
    for pair, value in numbers["rank_correlation"].items():
        lines.append(f"rank correlation of {pair}: {value:+.2f}")
    return "\n".join(lines)
