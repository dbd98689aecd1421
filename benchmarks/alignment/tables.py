"""Markdown tables of rows.jsonl: means over seeds, spread, paired intervals, each method at its best learning rate."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


def interval(values: np.ndarray, weights: np.ndarray | None = None, *, draws: int = 2000, seed: int = 0):
    """Mean (ratio of sums) with its 95 % bootstrap interval over prompts."""
    weights = np.ones_like(values) if weights is None else weights
    picks = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    means = values[picks].sum(1) / weights[picks].sum(1)
    return values.sum() / weights.sum(), *np.quantile(means, [0.025, 0.975])


def read(path: Path) -> list[Row]:
    """The rows of a file, the last of equal ones."""
    found = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        found[row["row"], row["bits"], row["start"], row["seed"], str(row.get("widths"))] = row
    return list(found.values())


def average(records: list[Row]) -> dict[str, np.ndarray]:
    """Per-prompt numbers averaged over seeds."""
    keys = records[0]["measured"]
    return {key: np.mean([np.array(r["measured"][key], dtype=float) for r in records], axis=0) for key in keys}


def method(spec: str) -> str:
    """A row's name without its learning rate."""
    head, *rest = spec.split(":")
    return ":".join([head.partition("@")[0], *rest])


def score(row: Row) -> float:
    """What a rate is chosen by: flips and KL of the probe prompts, over the start's; never the held-out prompts."""
    now, then = row["probe_best"], row["probe_start"]
    return sum(now[key] / max(then[key], 1e-12) for key in ("flips", "kl")) / 2


def best_rates(rows: list[Row]) -> dict[str, str]:
    """Method -> its row with the best probe, by the seeds all rates of the method have."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if "probe_best" in row:
            found.setdefault(method(row["row"]), {}).setdefault(row["row"], {})[row["seed"]] = score(row)
    best = {}
    for name, rates in found.items():
        shared = set.intersection(*(set(seeds) for seeds in rates.values()))
        best[name] = min(rates, key=lambda rate: np.mean([rates[rate][s] for s in shared or rates[rate]]))
    return best


def line(name: str, found: list[Row], start: dict[str, np.ndarray]) -> str:
    """One row of a table."""
    m = average(found)
    flips = [np.sum(r["measured"]["flips"]) / np.sum(r["measured"]["tokens"]) for r in found]
    shared = np.concatenate([np.array(r["measured"]["shared"]) - start["shared"] for r in found])
    fewer = 1 - np.mean(flips) / (start["flips"].sum() / start["tokens"].sum())
    cells = [
        name, str(len(found)), f"{np.mean(flips):.4f} ({min(flips):.4f}–{max(flips):.4f})", f"{100 * fewer:.0f} %",
        f"{m['kl'].sum() / m['tokens'].sum():.4f}", f"{np.exp(m['nll'].mean()):.3f}", f"{m['shared'].mean():.2f}",
        f"{(shared > 0).mean():.2f} / {(shared < 0).mean():.2f}", f"{m['lead'].sum() / m['tokens'].sum():.3f}",
        f"{100 * m['task'].mean():.1f}" if "task" in m else "",
        f"{np.mean([r.get('kept', 0) for r in found]):.0f}", f"{np.mean([r['seconds'] for r in found]):.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


HEAD = "| row | seeds | flips | fewer | KL | ppl | t* | win / lose vs start | lead | task | kept | s |"


def rates_table(rows: list[Row]) -> None:
    """Every method at its best rate, from every start; then what the other rates gave."""
    plain = [r for r in rows if "widths" not in r]
    for bits in sorted({r["bits"] for r in plain}, reverse=True):
        rtn = [r for r in plain if (r["bits"], r["start"], r["row"]) == (bits, "rtn", "start")]
        if not rtn:
            continue
        start = average(rtn)
        print(f"\n### {bits} bits\n\n{HEAD}\n" + "|---" * 12 + "|")
        for origin in ("rtn", "awq", "gptq"):
            mine = [r for r in plain if (r["bits"], r["start"]) == (bits, origin)]
            chosen = best_rates(mine)
            for name in dict.fromkeys(r["row"] for r in mine):
                if name == "start" or name in chosen.values():
                    label = origin.upper() if name == "start" else f"{origin.upper()} → {name}"
                    print(line(label, [r for r in mine if r["row"] == name], start))
            if origin == "rtn":
                compare(mine, chosen)


def compare(rows: list[Row], chosen: dict[str, str]) -> None:
    """Every method against KD, each at its best rate, paired by prompt and seed; and the rates that were not taken."""
    if "kd" not in chosen:
        return
    plain = [r for r in rows if r["row"] == chosen["kd"]]
    notes = [against(name, [r for r in rows if r["row"] == name], plain) for name in chosen.values()]
    others = [f"{r['row']} {score(r):.3f}" for r in rows if "probe_best" in r and r["seed"] == 0]
    print("<!-- " + "\n".join(note for note in notes if note) + f"\nprobe scores of seed 0: {', '.join(others)} -->")


def against(name: str, found: list[Row], plain: list[Row]) -> str:
    """Differences of one row to plain KD on the same prompts and seeds."""
    both = {r["seed"] for r in found} & {r["seed"] for r in plain}
    if not both or name == plain[0]["row"]:
        return ""
    a = average([r for r in found if r["seed"] in both])
    b = average([r for r in plain if r["seed"] in both])
    wins = [np.sign(np.array(r["measured"]["shared"], float) - np.array(p["measured"]["shared"], float))
            for r in found for p in plain if r["seed"] == p["seed"]]  # fmt: skip
    values = {
        "flips": interval(a["flips"] - b["flips"], a["tokens"]),
        "KL": interval(a["kl"] - b["kl"], a["tokens"]),
        "nll": interval(a["nll"] - b["nll"]),
        "win-lose": interval(np.mean(wins, axis=0)),
    }
    spelled = ", ".join(f"{label} {v[0]:+.4f} [{v[1]:+.4f}, {v[2]:+.4f}]" for label, v in values.items())
    return f"- {name} ({len(both)} seeds): {spelled}"


def elastic_table(rows: list[Row]) -> None:
    """Runs over several widths: flips / KL / perplexity at each width, mean over seeds."""
    ours = [r for r in rows if "widths" in r]
    for spec in dict.fromkeys(r["row"] for r in ours):
        cells = []
        mine = [r for r in ours if r["row"] == spec]
        for bits in sorted({r["bits"] for r in mine}, reverse=True):
            found = [r for r in mine if r["bits"] == bits]
            m = average(found)
            tokens = m["tokens"].sum()
            cells.append(f"w{bits} {m['flips'].sum() / tokens:.4f} / {m['kl'].sum() / tokens:.5f} "
                         f"/ {np.exp(m['nll'].mean()):.3f} / {m['shared'].mean():.2f}")  # fmt: skip
        seeds, seconds = len({r["seed"] for r in mine}), np.mean([r["seconds"] for r in mine])
        kept = {r.get("kept") for r in mine}
        print(f"| {spec} | {seeds} | {' | '.join(cells)} | {seconds:.0f} | {kept} |")


def write(paths: Iterable[Path]) -> None:
    """Print all tables."""
    rows = [row for path in paths for row in read(path)]
    rates_table(rows)
    elastic_table(rows)
