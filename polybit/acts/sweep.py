"""The same model quantized and measured under every combination of some options, with several seeds."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polybit.acts.evaluate import evaluate
from polybit.acts.quantize import quantize, recipe_for
from polybit.core.journal import Journal
from polybit.core.records import Run
from polybit.core.runtime import atomic_path, track
from polybit.evals.table import METRICS
from polybit.hub.directory import output_lock
from polybit.hub.models import resolve
from polybit.measure.seeds import over_seeds
from polybit.options.checks import plain
from polybit.options.sweep import SweepCell, SweepGrid, SweepOptions, read_grid
from polybit.report.sweep import sweep_page


def sweep(model: str, options: SweepOptions) -> Run:
    """Quantize and measure MODEL under every combination; a table with intervals over seeds, paired.

    An interrupted sweep goes on where it stopped when the same is asked again.
    """
    grid = read_grid(options)
    grid.eval_options(model)
    for cell in grid.cells:  # everything is read before anything runs
        recipe_for(cell.options(0, options.out / "cell"))
    with output_lock(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
        return swept(model, grid, options)


def swept(model: str, grid: SweepGrid, options: SweepOptions) -> Run:
    """Every combination that is not finished yet, the table of all."""
    fingerprint = {"model": str(Path(resolve(model)).resolve()), "eval": dict(grid.measured)}
    journal = Journal(options.out / "finished.json", fingerprint, restart=options.restart)
    run = Run("sweep", {"model": model, **plain(options)})
    with run.timed():
        for cell, seed in track([(cell, seed) for seed in grid.seeds for cell in grid.cells], "sweep"):
            if key_of(cell, seed) not in journal.done:
                journal.put(key_of(cell, seed), measured_cell(model, cell, grid, seed, options))
        rows = {c.name: [journal.done[key_of(c, seed)] for seed in grid.seeds] for c in grid.cells}
        run.numbers = summarized(grid, rows)
    run.write(options.out / "sweep.json")
    with atomic_path(options.out / "table.md") as staged:
        staged.write_text(sweep_page(run.numbers), encoding="utf-8")
    return run


def key_of(cell: SweepCell, seed: int) -> str:
    """What a finished combination is kept under."""
    return f"{cell.name} | {sorted(cell.flags.items())} | seed {seed}"


def measured_cell(model: str, cell: SweepCell, grid: SweepGrid, seed: int, options: SweepOptions) -> dict[str, Any]:
    """Quantize, save, reload, measure: the numbers of one combination and seed."""
    safe = "".join(c if c.isalnum() or c in "=-." else "_" for c in cell.name)
    out = options.out / "checkpoints" / f"{safe}-seed{seed}"
    made = quantize(model, cell.options(seed, out))
    presets = evaluate(str(out), grid.eval_options(model)).numbers["presets"]
    if not options.keep:
        shutil.rmtree(out, ignore_errors=True)
    return {
        "seconds": made.seconds,
        "cpu_seconds": made.cpu_seconds,
        "stored_bits_per_weight": made.numbers["stored_bits_per_weight"],
        "presets": {name: plain_numbers(row) for name, row in presets.items()},
    }


def plain_numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """One preset's measured numbers, a mean for an interval, tasks included."""
    found = {key: number_of(row[key]) for key in (*METRICS, "bits_per_weight", "bytes") if key in row}
    for task, scores in row.get("tasks", {}).items():
        found |= {
            f"{task} {metric}": number_of(score) for metric, score in scores.items() if isinstance(score, Mapping)
        }
    return {key: value for key, value in found.items() if value is not None}


def number_of(value: Any) -> float | None:
    """A number, or the mean of an interval; None for what is neither, such as a curve."""
    found = value.get("value") if isinstance(value, Mapping) else value
    return float(found) if isinstance(found, int | float) and not isinstance(found, bool) else None


def summarized(grid: SweepGrid, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Mean over seeds with Student's interval of every number, and paired differences to the baseline."""
    table: list[dict[str, Any]] = []
    for cell in grid.cells:
        for preset in rows[cell.name][0]["presets"]:
            seen = [row["presets"][preset] for row in rows[cell.name]]
            theirs = [row["presets"].get(preset) or only(row["presets"]) for row in rows[grid.baseline]]
            entry: dict[str, Any] = {"name": cell.name, "flags": dict(cell.flags), "preset": preset}
            entry["numbers"] = {key: over_seeds([s[key] for s in seen]).to_json() for key in shared(seen)}
            entry["seconds"] = over_seeds([row["seconds"] for row in rows[cell.name]]).to_json()
            if all(theirs) and cell.name != grid.baseline:
                entry["difference"] = {
                    key: over_seeds([s[key] for s in seen], [t[key] for t in theirs]).to_json()
                    for key in shared([*seen, *theirs])
                }
            entry["per_seed"] = seen
            table.append(entry)
    return {"baseline": grid.baseline, "seeds": list(grid.seeds), "rows": table}


def shared(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """The numbers that every row has, in the order of the first."""
    return [key for key in rows[0] if all(key in row for row in rows)]


def only(presets: Mapping[str, Any]) -> Any:
    """The single preset of a fixed file, which is compared whatever its name; None where there are several."""
    return next(iter(presets.values())) if len(presets) == 1 else None
