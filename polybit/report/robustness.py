"""The page of `polybit attack`: who is fooled by whom as a heat map, and what drawing a precision is worth."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from polybit.report.frame import framed, scrolled, short_name
from polybit.robust.table import ATTACKS

HEEDED = {  # what an attack changes -> the flags that count for it
    "tokens": ("place", "tokens", "steps", "tries", "seeds"),
    "words": ("tokens", "steps", "tries", "seeds"),
    "embeddings": ("epsilon", "steps", "seeds"),
}


def percent(estimate: Mapping[str, Any]) -> str:
    """A share with its interval."""
    value, low, high = (100 * estimate[name] for name in ("value", "low", "high"))
    return f"{value:.0f} %<small>{low:.0f} to {high:.0f}</small>"


def colour(value: float) -> str:
    """From dark red (nothing right) over white to dark green (all right), readable by the colour blind in lightness."""
    if value < 0.5:
        share = value / 0.5
        red, green, blue = 178 + 77 * share, 24 + 231 * share, 43 + 212 * share
    else:
        share = (value - 0.5) / 0.5
        red, green, blue = 255 - 222 * share, 255 - 153 * share, 255 - 83 * share
    text = "#fff" if value < 0.15 or value > 0.85 else "#111"
    return f"background:rgb({red:.0f},{green:.0f},{blue:.0f});color:{text}"


def heat_map(numbers: Mapping[str, Any]) -> str:
    """The matrix as a table: rows attack, columns answer."""
    defenders = [*numbers["defenders"], "drawn per prompt"]
    lines = ["<tr><th>attacked at \\ answered at</th>" + "".join(f"<th>{escape(d)}</th>" for d in defenders) + "</tr>"]
    for attacker, row in numbers["matrix"].items():
        cells = "".join(f'<td style="{colour(row[d]["value"])}">{percent(row[d])}</td>' for d in defenders)
        lines.append(f'<tr><th class="row">{escape(attacker)}</th>{cells}</tr>')
    return scrolled(f"<table>{''.join(lines)}</table>")


def page(run: Mapping[str, Any]) -> str:
    """One self-contained HTML page from the JSON of `polybit attack`."""
    numbers, config = run["numbers"], run["config"]
    name = short_name(config.get("target_name", config.get("target", "model")))
    return framed(
        f"Attacks on {name}",
        f"<p>{numbers['items']} questions of {escape(numbers['source'])}, "
        f"share answered exactly right, 95 % bootstrap interval over questions. {escape(settings(config))}.</p>",
        heat_map(numbers),
        f'<p class="verdict">{escape(numbers["verdict"])}</p>',
        f"<p>A row is an attacker who {escape(sight(config))} of one precision; the last one averages over all "
        "of them. The last column is a precision drawn per prompt, in expectation. It is called more robust only "
        "when it beats the best fixed precision, each under the attacker that harms it most, the averaging one "
        "included.</p>",
    )


def settings(config: Mapping[str, Any]) -> str:
    """What was attacked and how hard: the method with what it is, and the flags that count for it."""
    attack = ATTACKS.get(config.get("method", ""))
    method = f"method {config['method']} ({attack.summary})" if attack else ""
    shown = HEEDED.get(attack.changes, ()) if attack else ()
    return ", ".join(filter(None, [method, *(f"{name} {config[name]}" for name in shown if name in config)]))


def sight(config: Mapping[str, Any]) -> str:
    """What an attacker looks at."""
    attack = ATTACKS.get(config.get("method", ""))
    return "measures the loss" if attack is not None and not attack.gradient else "reads the gradient"


def terminal_table(numbers: Mapping[str, Any]) -> str:
    """The matrix as text."""
    defenders = [*numbers["defenders"], "drawn per prompt"]
    width = max(len(name) for name in (*numbers["matrix"], "attacked at")) + 2
    lines = ["attacked at".ljust(width) + "".join(name.rjust(max(8, len(name) + 2)) for name in defenders)]
    for attacker, row in numbers["matrix"].items():
        cells = (f"{100 * row[name]['value']:.0f} %".rjust(max(8, len(name) + 2)) for name in defenders)
        lines.append(attacker.ljust(width) + "".join(cells))
    return "\n".join(lines)
