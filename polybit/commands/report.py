"""`polybit report`: one self-contained HTML page from measured numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from polybit.core.runtime import PolybitError, atomic_path, write_json

RUN_FILE = "run.json"


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Flags of `polybit report`."""

    eval: Path | None = None
    """The JSON that `polybit eval --json` wrote (default: what `quantize` measured itself)."""
    out: Path = Path("report.html")
    """The page to write."""
    json: Path | None = None
    """Write what the page shows there too."""


def report(model: Path, /, *, config: Annotated[ReportConfig, Parameter(name="*")] = ReportConfig()) -> None:
    """Write the page of the checkpoint MODEL: quality against bits, flips, margins, bytes per layer, sample answers."""
    made = read_run(model / RUN_FILE, "quantize") if (model / RUN_FILE).is_file() else None
    if config.eval is not None:
        evaluation = read_run(config.eval, "eval")
    elif made is not None and "measured" in made["numbers"]:
        config_of_run = {**made["config"], "target_name": model.name, "text_name": made["config"]["calibration"]}
        evaluation = {**made, "config": config_of_run, "numbers": made["numbers"]["measured"]}
    else:
        raise PolybitError(
            f"{model} holds no measurement: run `polybit eval {model} --reference FLOAT_MODEL --json eval.json` "
            "and give --eval eval.json"
        )
    if config.out.is_dir():
        raise PolybitError(f"--out {config.out} is a directory: give the name of the page, as in report.html")
    from polybit.report.html import page

    text = page(evaluation, made)
    with atomic_path(config.out) as staged:
        staged.write_text(text, encoding="utf-8")
    if config.json is not None:
        write_json(config.json, {"quantize": made, "eval": evaluation})
    print(f"{config.out}: {len(text) / 1000:.0f} kB, one file, no links outwards")


def read_run(path: Path, verb: str) -> Mapping[str, Any]:
    """The JSON of an earlier run, refused when it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PolybitError(f"{path} does not exist: write it with `polybit {verb} ... --json {path}`") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PolybitError(f"{path} cannot be read as JSON ({error}): write it with `polybit {verb} --json`") from None
    if not isinstance(value, dict) or value.get("verb") != verb or "numbers" not in value:
        raise PolybitError(f"{path} is not what `polybit {verb} --json` writes: give that file")
    return value
