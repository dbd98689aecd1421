"""`polybit sweep`: the same model quantized and measured under every combination of some flags, with several seeds."""

from __future__ import annotations

import itertools
import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter

from polybit.core.runtime import PolybitError
from polybit.hub.models import resolve
from polybit.options.evaluate import WINDOWS, EvalOptions
from polybit.options.quantize import QuantizeOptions

Values = Annotated[list[str], Parameter(consume_multiple=True)]
OWN = ("out", "seed", "json", "overwrite", "restart", "measure", "reference")  # flags the sweep itself decides
SECTIONS = {"seeds", "baseline", "quantize", "eval", "variants"}
METRICS = ("kl", "delta_nll", "perplexity", "top1", "flips_text")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Flags of `polybit sweep`."""

    out: Path
    """Directory of the results: table.md, sweep.json, and what is finished so far."""
    grid: Path | None = None
    """TOML file with sections [quantize] and [eval] of flags, where a list is an axis, and [variants.NAME] of flags
    that go together."""
    axis: Values | None = None
    """Axes by hand: FLAG=VALUE,VALUE of polybit quantize, as in --axis bits=3,4 method=gptq,awq."""
    seeds: int | None = None
    """Seeds of every combination (default: 3, or what the grid says)."""
    baseline: str | None = None
    """Name of the combination the others are compared with (default: the first)."""
    keep: bool = False
    """Keep every checkpoint under --out (default: only numbers)."""
    restart: bool = False
    """Forget what an interrupted sweep has finished."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination: its name, and the flags of quantize that make it."""

    name: str
    flags: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Grid:
    """Everything a sweep runs."""

    cells: tuple[Cell, ...]
    measured: Mapping[str, Any]
    seeds: tuple[int, ...]
    baseline: str


def sweep(model: str, /, *, config: Annotated[SweepConfig, Parameter(name="*")]) -> None:
    """Quantize and measure MODEL under every combination of flags; a table with intervals over seeds, paired.

    An interrupted sweep goes on where it stopped when the same command is given again.
    """
    grid = read_grid(config)
    for cell in grid.cells:  # all flags are read before anything runs
        parse(model, cell.flags, grid.measured, seed=0, out=config.out / "cell")
    from polybit.core.journal import Journal
    from polybit.core.records import Run
    from polybit.core.runtime import track

    config.out.mkdir(parents=True, exist_ok=True)
    fingerprint = {"model": str(Path(resolve(model)).resolve()), "eval": dict(grid.measured)}
    journal = Journal(config.out / "finished.json", fingerprint, restart=config.restart)
    run = Run("sweep", {"model": model, **{k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}})
    todo = [(cell, seed) for seed in grid.seeds for cell in grid.cells]
    with run.timed():
        for cell, seed in track(todo, "sweep"):
            key = f"{cell.name} | {sorted(cell.flags.items())} | seed {seed}"
            if key not in journal.done:
                journal.put(key, measure_cell(model, cell, grid, seed, config))
        rows = {
            c.name: [journal.done[f"{c.name} | {sorted(c.flags.items())} | seed {s}"] for s in grid.seeds]
            for c in grid.cells
        }
        run.numbers = summarize(grid, rows)
    run.write(config.out / "sweep.json")
    write_table(config.out / "table.md", run.numbers)
    print_table(run.numbers)
    print(f"\nAll numbers: {config.out / 'sweep.json'}; table: {config.out / 'table.md'}")


def read_grid(config: SweepConfig) -> Grid:
    """The combinations a TOML file and the --axis flags mean."""
    value = read_toml(config.grid) if config.grid is not None else {}
    axes = dict(value.get("quantize", {})) | read_axes(config.axis or [])
    variants = value.get("variants", {}) or {"": {}}
    if not isinstance(variants, Mapping) or not all(isinstance(v, Mapping) for v in variants.values()):
        raise PolybitError(f"--grid {config.grid}: [variants] holds tables of flags, as in [variants.uniform]")
    if not axes and set(variants) == {""}:
        raise PolybitError("the sweep has nothing to vary: give --axis FLAG=VALUE,VALUE or --grid with lists of values")
    cells = []
    for name, own in variants.items():
        merged = {key: values if isinstance(values, list) else [values] for key, values in {**axes, **own}.items()}
        check_flags(dict.fromkeys(merged), QuantizeOptions, "quantize")
        varied = [key for key, values in merged.items() if len(values) > 1]
        for combination in itertools.product(*merged.values()):
            flags = dict(zip(merged, combination, strict=True))
            parts = [name] if name else []
            parts += [f"{key}={flags[key]}" for key in varied]
            cells.append(Cell(" ".join(parts) or "only", flags))
    measured = value.get("eval", {})
    check_flags(measured, EvalOptions, "eval")
    baseline = config.baseline or value.get("baseline") or cells[0].name
    names = [cell.name for cell in cells]
    if baseline not in names or len(set(names)) != len(names):
        raise PolybitError(
            f"baseline {baseline!r} is not one of the combinations: choose from {', '.join(names)}"[:600]
        )
    return Grid(
        tuple(cells),
        measured,
        read_seeds(config.seeds if config.seeds is not None else value.get("seeds", 3)),
        baseline,
    )


def read_toml(path: Path) -> dict[str, Any]:
    """The grid file, refused when it is not TOML or has sections a sweep does not know."""
    if not path.is_file():
        raise PolybitError(f"--grid {path}: there is no such file; give a TOML file with [quantize] and [eval]")
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PolybitError(f"--grid {path} is not TOML ({error}): write [quantize] with flags and lists") from error
    unknown = sorted(set(value) - SECTIONS)
    if unknown:
        raise PolybitError(f"--grid {path} has the unknown entry {unknown[0]!r}: use {', '.join(sorted(SECTIONS))}")
    return value


def read_axes(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`bits=3,4` as {"bits": [3, 4]}; a value is a number, true, false or text."""
    axes: dict[str, list[Any]] = {}
    for text in texts:
        key, sign, values = text.partition("=")
        if not sign or not values or not key.strip():
            raise PolybitError(f"--axis {text!r} cannot be read: write FLAG=VALUE,VALUE as in --axis bits=3,4")
        axes[key.strip().replace("-", "_")] = [plain(part.strip()) for part in values.split(",")]
    return axes


def plain(text: str) -> Any:
    """A TOML literal where the text is one, else the text."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def read_seeds(value: Any) -> tuple[int, ...]:
    """A number of seeds, or the seeds themselves."""
    seeds = list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value
    good = isinstance(seeds, list) and seeds and all(isinstance(s, int) and s >= 0 for s in seeds)
    if not good or len(set(seeds)) != len(seeds):
        raise PolybitError(f"seeds {value!r:.60} are not possible: give how many, 1 or more, or a list of numbers")
    return tuple(seeds)


def check_flags(flags: Mapping[str, Any], config: type, verb: str) -> None:
    """Refuse flags the verb does not have, and those the sweep decides itself."""
    known = {field.name for field in fields(config)} - set(OWN)
    unknown = sorted(key for key in flags if key.replace("-", "_") not in known)
    if unknown:
        raise PolybitError(
            f"{unknown[0]!r} is no flag of polybit {verb} that a sweep can set: use {', '.join(sorted(known))}"
        )


def words(flags: Mapping[str, Any]) -> list[str]:
    """Flags as they would be typed."""
    typed: list[str] = []
    for key, value in flags.items():
        flag = key.replace("_", "-")
        typed += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return typed


def parse(
    model: str, flags: Mapping[str, Any], measured: Mapping[str, Any], *, seed: int, out: Path
) -> tuple[QuantizeOptions, EvalOptions]:
    """The configurations of one combination, read by the same parser as the command line."""
    from polybit.acts.quantize import recipe_for

    def quantize(model: str, /, *, config: Annotated[QuantizeOptions, Parameter(name="*")]) -> QuantizeOptions:
        return config

    def evaluate(target: str, /, *, config: Annotated[EvalOptions, Parameter(name="*")] = EvalOptions()) -> EvalOptions:
        return config

    own = ["--out", str(out), "--seed", str(seed), "--no-measure", "--overwrite"]
    found = read_tokens(quantize, [model, *own, *words(flags)])
    recipe_for(found)
    return found, read_tokens(evaluate, [str(out), "--reference", model, *words({"windows": WINDOWS, **measured})])


def read_tokens(function: Callable[..., Any], tokens: list[str]) -> Any:
    """What a verb's function makes of a command line."""
    app = App(default_command=function, result_action="return_value")
    try:
        command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        raise PolybitError(f"a combination of the sweep cannot be run: {' '.join(str(error).split())}") from None
    return command(*bound.args, **bound.kwargs)


def measure_cell(model: str, cell: Cell, grid: Grid, seed: int, config: SweepConfig) -> dict[str, Any]:
    """Quantize, save, reload, measure: the numbers of one combination and seed."""
    from polybit.acts.evaluate import evaluate
    from polybit.acts.quantize import quantize

    safe = "".join(c if c.isalnum() or c in "=-." else "_" for c in cell.name)
    out = config.out / "checkpoints" / f"{safe}-seed{seed}"
    quantizing, measuring = parse(model, cell.flags, grid.measured, seed=seed, out=out)
    run = quantize(model, quantizing)
    numbers = evaluate(str(out), measuring).numbers
    if not config.keep:
        shutil.rmtree(out, ignore_errors=True)
    return {
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
        "stored_bits_per_weight": run.numbers["stored_bits_per_weight"],
        "presets": {name: plain_numbers(row) for name, row in numbers["presets"].items()},
    }


def plain_numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The means of one preset's measured numbers, tasks included."""
    found = {key: float(row[key]["value"]) for key in METRICS if row.get(key)}
    found |= {key: float(row[key]) for key in ("bits_per_weight", "bytes") if key in row}
    for task, scores in row.get("tasks", {}).items():
        found |= {
            f"{task} {metric}": float(score["value"])
            for metric, score in scores.items()
            if isinstance(score, Mapping) and "value" in score
        }
    return found


def summarize(grid: Grid, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Mean over seeds with Student's interval of every number, and paired differences to the baseline."""
    from polybit.measure.seeds import over_seeds

    table: list[dict[str, Any]] = []
    for cell in grid.cells:
        for preset in rows[cell.name][0]["presets"]:
            seen = [row["presets"][preset] for row in rows[cell.name]]
            theirs = [row["presets"].get(preset) or only(row["presets"]) for row in rows[grid.baseline]]
            entry: dict[str, Any] = {"name": cell.name, "flags": dict(cell.flags), "preset": preset}
            entry["numbers"] = {key: over_seeds([s[key] for s in seen]).to_json() for key in seen[0]}
            entry["seconds"] = over_seeds([row["seconds"] for row in rows[cell.name]]).to_json()
            if all(theirs) and cell.name != grid.baseline:
                shared = [key for key in seen[0] if all(t is not None and key in t for t in theirs)]
                entry["difference"] = {
                    key: over_seeds([s[key] for s in seen], [t[key] for t in theirs if t is not None]).to_json()
                    for key in shared
                }
            entry["per_seed"] = seen
            table.append(entry)
    return {"baseline": grid.baseline, "seeds": list(grid.seeds), "rows": table}


def only(presets: Mapping[str, Any]) -> Any:
    """The single preset of a fixed file, which is compared whatever its name; None where there are several."""
    return next(iter(presets.values())) if len(presets) == 1 else None


def table_cells(numbers: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the result table."""
    from polybit.report.tables import estimate, number

    tasks = [key for key in numbers["rows"][0]["numbers"] if key not in (*METRICS, "bits_per_weight", "bytes")]
    header = ["run", "bits/weight", "KL (nats)", f"KL less that of {numbers['baseline']}", "perplexity", *tasks, "s"]
    rows = []
    for row in numbers["rows"]:
        got = row["numbers"]
        difference = row.get("difference", {}).get("kl")
        rows.append(
            [
                f"{row['name']}, {row['preset']}",
                number(got.get("bits_per_weight", {}).get("value"), 4),
                estimate(got["kl"]),
                estimate(difference) if difference else "",
                estimate(got["perplexity"]),
                *(estimate(got.get(task)) for task in tasks),
                number(row["seconds"]["value"]),
            ]
        )
    return header, rows


def write_table(path: Path, numbers: Mapping[str, Any]) -> None:
    """The table in Markdown, with a line that says what the intervals are."""
    from polybit.core.runtime import atomic_path
    from polybit.report.tables import markdown

    note = f"Mean over {len(numbers['seeds'])} seeds with 95 % Student intervals; differences are paired by seed."
    with atomic_path(path) as staged:
        staged.write_text(markdown(*table_cells(numbers)) + f"\n\n{note}\n", encoding="utf-8")


def print_table(numbers: Mapping[str, Any]) -> None:
    """The table on the terminal."""
    from polybit.report.tables import aligned

    print(aligned(*table_cells(numbers)))
