"""Write the page of a checkpoint from numbers that were measured before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polybit.core.records import RUN_FILE, Run, read_run
from polybit.core.runtime import PolybitError, atomic_path
from polybit.options.checks import plain
from polybit.options.report import ReportOptions
from polybit.report import alignment
from polybit.report.html import page, parts_page


def report(model: str, options: ReportOptions) -> Run:
    """Write the page of MODEL; the Run holds the JSON of every run it was made from."""
    path = Path(model)
    run = Run("report", {"model": model, **plain(options)})
    with run.timed():
        made = read_run(path / RUN_FILE, "quantize") if (path / RUN_FILE).is_file() else None
        judged = None if options.judge is None else read_run(options.judge, "judge")
        aligned = None if options.align is None else read_run(options.align, "align")
        evaluation = find_evaluation(path, made, options)
        others = read_others(options.before)
        runs = others | ({} if evaluation is None else {unused(path.name or "model", others): evaluation})
        further = [each for each in (*others.values(), aligned, judged) if each]
        try:
            parts = alignment.parts(runs, judged, aligned)
            if evaluation is None:
                text = parts_page(path.name, parts, further)
            else:
                said = alignment.side_by_side(runs) if others else None
                text = page(evaluation, made, parts=parts, said=said, others=further)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError, ArithmeticError) as error:
            raise PolybitError(
                f"a JSON file of the report lacks numbers that it must have ({type(error).__name__}: {error!s:.80}): "
                "it was cut or edited, measure again"
            ) from error
        with atomic_path(options.out) as staged:
            staged.write_bytes(text.encode("utf-8", "replace"))  # half a character of an answer becomes "?"
    run.numbers = {"quantize": made, "eval": evaluation, "before": others, "judge": judged, "align": aligned}
    return run


def find_evaluation(model: Path, made: Mapping[str, Any] | None, options: ReportOptions) -> Mapping[str, Any] | None:
    """The run of `polybit eval`, or what `quantize` measured; None where --judge or --align alone make the page."""
    if options.eval is not None:
        return read_run(options.eval, "eval")
    if made is not None and "measured" in made["numbers"]:
        config_of_run = {**made["config"], "target_name": model.name, "text_name": made["config"]["calibration"]}
        return {**made, "config": config_of_run, "numbers": made["numbers"]["measured"]}
    if options.before is None and (options.judge is not None or options.align is not None):
        if not model.is_dir():
            raise PolybitError(f"{model} is no checkpoint: give the directory that `polybit quantize` or `align` wrote")
        return None
    raise PolybitError(
        f"{model} holds no measurement: run `polybit eval {model} --reference FLOAT_MODEL --json eval.json` "
        "and give --eval eval.json"
    )


def read_others(before: str | None) -> dict[str, Mapping[str, Any]]:
    """The runs of --before by row name: the one given, else the name of the model that was measured."""
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
