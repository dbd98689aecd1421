"""`polybit report`: one self-contained HTML page from measured numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from polybit.core.runtime import PolybitError, atomic_path, write_json


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Flags of `polybit report`."""

    eval: Path | None = None
    """The JSON that `polybit eval --json` wrote (default: what `quantize` measured itself)."""
    before: str | None = None
    """JSON of `polybit eval` of other models on the same text, with commas, as in RTN=rtn.json,KD=kd.json: rows beside
    MODEL, as before and after alignment."""
    judge: Path | None = None
    """JSON of `polybit judge` (its run.json): win, tie, lose, grades, fidelity, conversations side by side."""
    align: Path | None = None
    """JSON of `polybit align --json`: what the training did, and which moment was kept."""
    out: Path = Path("report.html")
    """The page to write."""
    json: Path | None = None
    """Write what the page shows there too."""


def report(model: Path, /, *, config: Annotated[ReportConfig, Parameter(name="*")] = ReportConfig()) -> None:
    """Write the page of the checkpoint MODEL: quality against bits, flips, margins, bytes per layer, sample answers.

    With --before, --judge or --align also what alignment changed: margins, flips, judged answers, side by side.
    """
    from polybit.core.records import RUN_FILE, read_run

    made = read_run(model / RUN_FILE, "quantize") if (model / RUN_FILE).is_file() else None
    judged = None if config.judge is None else read_run(config.judge, "judge")
    aligned = None if config.align is None else read_run(config.align, "align")
    evaluation = find_evaluation(model, made, config)
    if config.out.is_dir():
        raise PolybitError(f"--out {config.out} is a directory: give the name of the page, as in report.html")
    from polybit.report import alignment
    from polybit.report.html import page, parts_page

    others = read_others(config.before)
    runs = others | ({} if evaluation is None else {unused(model.name or "model", others): evaluation})
    parts = alignment.parts(runs, judged, aligned)
    further = [run for run in (*others.values(), aligned, judged) if run]
    if evaluation is None:
        text = parts_page(model.name, parts, further)
    else:
        said = alignment.side_by_side(runs) if others else None
        text = page(evaluation, made, parts=parts, said=said, others=further)
    with atomic_path(config.out) as staged:
        staged.write_text(text, encoding="utf-8")
    if config.json is not None:
        write_json(
            config.json, {"quantize": made, "eval": evaluation, "before": others, "judge": judged, "align": aligned}
        )
    print(f"{config.out}: {len(text) / 1000:.0f} kB, one file, no links outwards")


def find_evaluation(model: Path, made: Mapping[str, Any] | None, config: ReportConfig) -> Mapping[str, Any] | None:
    """The run of `polybit eval`, or what `quantize` measured; None where --judge or --align alone make the page."""
    from polybit.core.records import read_run

    if config.eval is not None:
        return read_run(config.eval, "eval")
    if made is not None and "measured" in made["numbers"]:
        config_of_run = {**made["config"], "target_name": model.name, "text_name": made["config"]["calibration"]}
        return {**made, "config": config_of_run, "numbers": made["numbers"]["measured"]}
    if config.before is None and (config.judge is not None or config.align is not None):
        if not model.is_dir():
            raise PolybitError(f"{model} is no checkpoint: give the directory that `polybit quantize` or `align` wrote")
        return None
    raise PolybitError(
        f"{model} holds no measurement: run `polybit eval {model} --reference FLOAT_MODEL --json eval.json` "
        "and give --eval eval.json"
    )


def read_others(before: str | None) -> dict[str, Mapping[str, Any]]:
    """The runs of --before by row name: the one given, else the name of the model that was measured."""
    from polybit.core.records import read_run

    found: dict[str, Mapping[str, Any]] = {}
    for entry in filter(None, (part.strip() for part in (before or "").split(","))):
        name, _, path = entry.rpartition("=")
        run = read_run(Path(path), "eval")
        name = name or run["config"].get("target_name") or Path(path).stem
        if name in found:
            raise PolybitError(f"--before has two rows called {name!r}: name them, as in RTN={path}")
        found[name] = run
    return found


def unused(name: str, taken: Mapping[str, Any]) -> str:
    """The model's name, told apart from a row before it of the same name."""
    return f"{name} (after)" if name in taken else name
