"""Tables of what benchmarks/switchable.py and benchmarks/rotated.py measured.

    python benchmarks/switch_tables.py DIR [DIR ...]       (every rows.jsonl below them)

Means over seeds, ± half a 95 % interval (Student's t over seeds); shares and times are paired by seed with the models
trained for one preset alone. How a share is defined: benchmarks/switchable.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from math import exp
from pathlib import Path
from typing import Any

from bench_rows import cell, read_rows

SETS = {"w": ("w8", "w6", "w4", "w3"), "wa": ("w8a8", "w4a4", "w3a4")}
Row = dict[str, Any]


def label(row: Row, *left_out: str) -> str:
    """The settings that rows of one table share."""
    results = ("part", "arm", "preset", "seed", "cpu", "wall", "start", "end", "spent", "forward_bitops", "repeat")
    return ", ".join(f"{k} {v}" for k, v in row.items() if k not in (*results, *left_out))


def grouped(rows: Sequence[Row], name: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Rows by a name, in the order they come."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(name(row), []).append(row)
    return found


def share(row: Row, alone: Row, preset: str) -> float:
    """Per cent of the independent model's score, see benchmarks/switchable.py."""
    ours, theirs = row["end"][preset], alone["end"][preset]
    if row["model"] == "tinychat":
        return 100 * ours["exact"] / theirs["exact"]
    return 100 * exp(theirs["nll"] - ours["nll"])


def sets(rows: Sequence[Row]) -> None:
    """Every arm against independent models."""
    for title, ours in grouped([r for r in rows if r["part"] == "sets"], label).items():
        names = SETS[ours[0]["set"]]
        alone = {(r["preset"], r["seed"]): r for r in ours if r["arm"] == "independent"}
        exact = ours[0]["model"] == "tinychat"
        print(f"\n### {title}\n")
        print("| arm | seeds | " + " | ".join(names) + " | CPU | wall |\n|" + "---|" * (len(names) + 4))
        for arm, mine in grouped(ours, lambda row: row["arm"]).items():
            cells = []
            for name in names:
                there = [r for r in mine if r.get("preset", name) == name]
                ends = [r["end"][name] for r in there]
                if not ends:
                    cells.append("–")
                    continue
                parts = [cell([100 * e["exact"] for e in ends], 1)] if exact else []
                parts += ["nats " + cell([e["nll"] for e in ends], 4), "KL " + cell([e["kl"] for e in ends], 4)]
                pairs = [(r, alone.get((name, r["seed"]))) for r in there if arm != "independent"]
                shares = [share(r, a, name) for r, a in pairs if a]
                parts += ["**" + cell(shares, 2, " %") + "**"] if shares else []
                cells.append(", ".join(parts))
            seeds = sorted({row["seed"] for row in mine})
            times = [times_of(mine, alone, names, clock) for clock in ("cpu", "wall")]
            print(f"| {arm} | {len(seeds)} | {' | '.join(cells)} | {' | '.join(times)} |")
        for row in ours:
            if row["start"]:
                name = row["arm"] + (f" {row['preset']}" if "preset" in row else "")
                print(f"\nstart of {name}: " + ", ".join(f"{k} {short(v)}" for k, v in row["start"].items()))


def times_of(mine: Sequence[Row], alone: dict[tuple[str, int], Row], names: Sequence[str], clock: str) -> str:
    """Training time over that of all independent models of the same seed."""
    found = []
    for row in mine:
        total = [alone[name, row["seed"]][clock] for name in names if (name, row["seed"]) in alone]
        if row["arm"] != "independent" and len(total) == len(names):
            found.append(row[clock] / sum(total))
    return cell(found, 2) if found else "1" if mine[0]["arm"] == "independent" else "–"


def short(measured: Row) -> str:
    """One measurement in a few words."""
    return f"{100 * measured['exact']:.1f} % nats {measured['nll']:.4f} KL {measured['kl']:.5f}"


def recovered(rows: Sequence[Row]) -> None:
    """Share of the loss post-training quantization made that training took back, in nats and in KL."""
    for title, ours in grouped([r for r in rows if r["part"] in ("recover", "rotated")], label).items():
        print(f"\n### {ours[0]['part']}: {title}\n")
        print("| preset | arm | seeds | float | before | after | of the nats | of the KL |\n" + "|---" * 8 + "|")
        for (preset, arm), mine in grouped(ours, lambda r: (r["preset"], r.get("arm", ""))).items():  # type: ignore[arg-type, return-value]
            nats, kls, before, after = [], [], [], []
            for row in mine:
                start, end, base = row["start"][preset], row["end"][preset], row["start"]["float"]
                nats.append(100 * (start["nll"] - end["nll"]) / (start["nll"] - base["nll"]))
                kls.append(100 * (1 - end["kl"] / start["kl"]))
                before.append(start["nll"])
                after.append(end["nll"])
            print(
                f"| {preset} | {arm} | {len(mine)} | {base['nll']:.4f} | {cell(before, 4)} | {cell(after, 4)} | "
                f"**{cell(nats, 0, ' %')}** | {cell(kls, 0, ' %')} |"
            )


def cycled(rows: Sequence[Row]) -> None:
    """Cyclic precision against static ones."""
    for title, ours in grouped([r for r in rows if r["part"] == "cyclic"], label).items():
        widths = list(ours[0]["end"])
        print(f"\n### cyclic: {title}\n")
        print(
            "| arm | seeds | nats at "
            + " | ".join(widths)
            + " | sd at w8a8 | forward BitOPs |\n|"
            + "---|" * (len(widths) + 4)
        )
        base = {r["seed"]: r["end"][widths[0]]["nll"] for r in ours if r["arm"] == "static 8"}
        for arm, mine in grouped(ours, lambda row: row["arm"]).items():
            nats = {w: [r["end"][w]["nll"] for r in mine] for w in widths}
            gains = [r["end"][widths[0]]["nll"] - base[r["seed"]] for r in mine if r["seed"] in base]
            mean = sum(nats[widths[0]]) / len(mine)
            sd = (sum((x - mean) ** 2 for x in nats[widths[0]]) / max(1, len(mine) - 1)) ** 0.5
            cells = " | ".join(cell(nats[w], 4) for w in widths)
            print(f"| {arm} | {len(mine)} | {cells} | {sd:.4f} | {mine[0]['forward_bitops']:.4f} |")
            if arm != "static 8" and gains:
                print(f"<!-- {arm} minus static 8, paired: {cell(gains, 4)} nats -->")


def costs(rows: Sequence[Row]) -> None:
    """A step over all presets against one step for each."""
    for title, ours in grouped([r for r in rows if r["part"] == "cost"], label).items():
        names = SETS[ours[0]["set"]]
        print(f"\n### cost: {title}")
        for clock in ("cpu", "wall"):
            for arm in ("all", "sandwich", "random"):
                found = [r["spent"][arm][clock] / sum(r["spent"][name][clock] for name in names) for r in ours]
                print(f"{clock} of {arm}, over one step for each preset: {cell(found, 2)}")


def main() -> None:
    """Print every table."""
    rows = [
        row for name in sys.argv[1:] for path in sorted(Path(name).glob("**/rows.jsonl")) for row in read_rows(path)
    ]
    sets(rows)
    recovered(rows)
    cycled(rows)
    costs(rows)
    known = ("sets", "recover", "rotated", "cyclic", "cost", "swaps", "pgd", "rpt")
    for row in rows:
        if row["part"] not in known:
            print(json.dumps(row))


if __name__ == "__main__":
    main()
