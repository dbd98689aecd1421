"""What `sweep` can be told, and the grid of combinations that this means."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polybit.core.runtime import PolybitError
from polybit.options.checks import LARGEST_SEED
from polybit.options.evaluate import WINDOWS, EvalOptions
from polybit.options.quantize import QuantizeOptions
from polybit.options.typed import check_fields, record

OWN = ("out", "seed", "overwrite", "restart", "measure", "reference")  # options the sweep itself decides
SECTIONS = {"seeds", "baseline", "quantize", "eval", "variants"}


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Which combinations of options to quantize and measure a model under."""

    out: Path
    """Directory of the results: table.md, sweep.json, and what is finished so far."""
    grid: Path | None = None
    """TOML file with sections [quantize] and [eval] of flags, where a list is an axis, and [variants.NAME] of flags
    that go together."""
    axis: list[str] | None = None
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
class SweepCell:
    """One combination: its name, and the options of quantize that make it."""

    name: str
    flags: Mapping[str, Any]

    def options(self, seed: int, out: Path) -> QuantizeOptions:
        """The record of one checkpoint."""
        return record(QuantizeOptions, {**self.flags, "out": out, "seed": seed, "measure": False, "overwrite": True})


@dataclass(frozen=True, slots=True)
class SweepGrid:
    """Everything a sweep runs."""

    cells: tuple[SweepCell, ...]
    measured: Mapping[str, Any]
    seeds: tuple[int, ...]
    baseline: str

    def eval_options(self, model: str) -> EvalOptions:
        """How every checkpoint is measured, beside its float model."""
        return record(EvalOptions, {"windows": WINDOWS, **self.measured, "reference": model})


def read_grid(options: SweepOptions) -> SweepGrid:
    """The combinations a TOML file and the axes by hand mean."""
    value = read_toml(options.grid) if options.grid is not None else {}
    axes = dict(value.get("quantize", {})) | read_axes(options.axis or [])
    variants = value.get("variants", {}) or {"": {}}
    if not isinstance(variants, Mapping) or not all(isinstance(v, Mapping) for v in variants.values()):
        raise PolybitError(f"--grid {options.grid}: [variants] holds tables of flags, as in [variants.uniform]")
    if not axes and set(variants) == {""}:
        raise PolybitError("the sweep has nothing to vary: give --axis FLAG=VALUE,VALUE or --grid with lists of values")
    cells = [cell for name, own in variants.items() for cell in combinations(name, {**axes, **own})]
    measured = value.get("eval", {})
    check_fields(EvalOptions, measured, "eval", OWN)
    baseline = options.baseline or value.get("baseline") or cells[0].name
    names = [cell.name for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) != len(names) else []
    if twice:
        raise PolybitError(f"the sweep has the combination {twice[0]!r:.120} twice: give every value once")
    if baseline not in names:
        raise PolybitError(
            f"baseline {baseline!r} is not one of the combinations: choose from {', '.join(names)}"[:600]
        )
    seeds = read_seeds(options.seeds if options.seeds is not None else value.get("seeds", 3))
    return SweepGrid(tuple(cells), measured, seeds, baseline)


def combinations(name: str, flags: Mapping[str, Any]) -> list[SweepCell]:
    """Every combination of a variant's flags, where a list is an axis."""
    merged = {key: values if isinstance(values, list) else [values] for key, values in flags.items()}
    check_fields(QuantizeOptions, merged, "quantize", OWN)
    varied = [key for key, values in merged.items() if len(values) > 1]
    cells = []
    for combination in itertools.product(*merged.values()):
        chosen = dict(zip(merged, combination, strict=True))
        parts = ([name] if name else []) + [f"{key}={chosen[key]}" for key in varied]
        cells.append(SweepCell(" ".join(parts) or "only", chosen))
    return cells


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
        axes[key.strip().replace("-", "_")] = [literal(part.strip()) for part in values.split(",")]
    return axes


def literal(text: str) -> Any:
    """A TOML literal where the text is one, else the text."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def read_seeds(value: Any) -> tuple[int, ...]:
    """A number of seeds, or the seeds themselves."""
    seeds = list(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value
    good = isinstance(seeds, list) and seeds and all(isinstance(s, int) and 0 <= s < LARGEST_SEED for s in seeds)
    if not good or len(set(seeds)) != len(seeds):
        raise PolybitError(f"seeds {value!r:.60} are not possible: give how many, 1 or more, or a list of numbers")
    return tuple(seeds)
