"""What `polybit eval --squad` does: questions of a SQuAD file answered at every precision, sealed, then scored."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polybit.core.runtime import PolybitError
from polybit.hub.models import resolve

if TYPE_CHECKING:  # `polybit VERB --help` loads no torch
    from polybit.data.squad import SquadFile

EMBEDDED = "embedded"  # the reading task of the embedded generator, in SQuAD's layout
HEADS = ("generate", "span")
EMBEDDED_ITEMS, EMBEDDED_SEED = 500, 30_000


def open_file(name: str, folder: Path, count: int | None) -> SquadFile:
    """The questions asked for: a file, or the embedded reading task written as one."""
    from polybit.data.squad import SquadFile, write_squad

    if name == EMBEDDED:
        from polybit.data import synth

        return write_squad(folder / "embedded.json", synth.items("reading", count or EMBEDDED_ITEMS, EMBEDDED_SEED))
    return SquadFile(Path(name))


def folder_of(config: Any) -> Path:
    """Where predictions are frozen: beside --json, else a folder of its own in the system's temporary place."""
    if config.json is not None:
        return Path(config.json).with_name(Path(config.json).stem + "-predictions")
    return Path(tempfile.mkdtemp(prefix="polybit-squad-"))


def check_squad(config: Any) -> None:
    """Refuse flags that make no sense before anything is loaded."""
    if config.squad_head not in HEADS:
        raise PolybitError(f"--squad-head {config.squad_head!r} is not known: choose generate or span")
    if config.squad is None:
        if config.squad_head != "generate":
            raise PolybitError("--squad-head span needs --squad FILE")
        return
    if config.squad != EMBEDDED and not Path(config.squad).is_file():
        raise PolybitError(
            f"--squad {config.squad}: there is no such file; give a SQuAD .json, or 'embedded' for the reading task"
        )
    if config.squad_items is not None and config.squad_items < 1:
        raise PolybitError(f"--squad-items {config.squad_items} is not possible: give 1 or more")


def squad_numbers(models: dict[str, tuple[Any, str | None]], config: Any, *, reference: str | None) -> dict[str, Any]:
    """EM and F1 of every model (label -> (view of a model, preset)), and their differences to the reference."""
    from polybit.data.squad import choose
    from polybit.evals.squad import differences, generative, run, spans, summarize

    folder = folder_of(config)
    file = open_file(config.squad, folder, config.squad_items)
    asked = choose(file.questions(), config.squad_items, config.seed)
    korean = "korquad" in file.version().lower()
    threshold = 0.0 if file.version().startswith("v2") else None
    scores = {}
    for label, (view, preset) in models.items():
        with view.at(preset):
            answerer = spans(view, null_threshold=threshold) if config.squad_head == "span" else generative(view)
            scores[label] = run(answerer, asked, file, folder / f"{label}.json", korean=korean)
    rows: dict[str, Any] = {}
    for label, found in scores.items():
        rows[label] = {name: estimate.to_json() for name, estimate in summarize(found, seed=config.seed).items()}
        if reference is not None and label != reference:
            paired = differences(found, scores[reference], seed=config.seed)
            rows[label]["difference"] = {name: estimate.to_json() for name, estimate in paired.items()}
    return {
        "file": file.name,
        "head": config.squad_head,
        "questions": len(asked),
        "predictions": str(folder),
        "scores": rows,
    }


def measure_spans(target: str, config: Any) -> dict[str, Any]:
    """A model with a span head, at every precision asked for; a float model as it is."""
    from polybit.compress.sizes import quantized_layers
    from polybit.hub.span import SpanReader, load_span

    reader = SpanReader(*load_span(resolve(target)))
    wanted = [name.strip() for name in (config.precision or "").split(",") if name.strip()]
    if wanted and not quantized_layers(reader.model):
        raise PolybitError(
            f"--precision {config.precision}: {target} is a float model without stored widths; quantize it first"
        )
    models: dict[str, tuple[Any, str | None]] = {name: (reader, name) for name in wanted} or {"float": (reader, None)}
    return squad_numbers(models, config, reference=None)


def squad_table(numbers: dict[str, Any]) -> str:
    """The scores as lines for a terminal."""
    lines = [f"{numbers['file']}, {numbers['questions']} questions, {numbers['head']}: EM, F1 (95 % interval)"]
    for label, row in numbers["scores"].items():
        cells = [
            f"{100 * row[name]['value']:5.1f} ({100 * row[name]['low']:.1f}-{100 * row[name]['high']:.1f})"
            for name in ("em", "f1")
        ]
        lines.append(f"  {label:<10} {cells[0]:>20} {cells[1]:>20}")
    return "\n".join(lines)
