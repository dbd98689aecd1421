"""`polybit train --head span`: the parts that differ when answers are places in a text and not words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polybit.core.runtime import PolybitError
from polybit.hub.models import EMBEDDED, resolve


def prepare(name: str, config: Any, presets: Mapping[str, Any]):
    """(trainable model, tokenizer, name of the float model, digest, presets without the head)."""
    from polybit.hub.load import quantization_of
    from polybit.hub.span import load_span
    from polybit.hub.workspace import model_digest
    from polybit.train.latent import Freedom, make_trainable
    from polybit.train.spans import float_head

    source = resolve(name)
    if quantization_of(source) is not None:
        raise PolybitError(f"{name} is quantized: a span head is trained from the float model, give that")
    model, tokenizer = load_span(source, new_head=not has_head(source))
    plans = float_head(presets)
    freedom = Freedom(scales=config.scales, rank=config.rank)
    make_trainable(model, plans, group_size=config.group_size, adapter=config.adapter, freedom=freedom)
    parent = EMBEDDED if Path(source) == Path(resolve(EMBEDDED)) else name
    return model, tokenizer, parent, model_digest(model), plans


def has_head(source: str) -> bool:
    """Whether a model was saved with a span head."""
    from polybit.hub.load import load_config

    names = getattr(load_config(source), "architectures", None) or []
    return any("QuestionAnswering" in name for name in names)


def material(config: Any, model, tokenizer):
    """(windows to train on, held-out windows): no question has windows in both."""
    from random import Random

    from polybit.data.spans import span_targets, span_windows
    from polybit.data.squad import choose
    from polybit.hub.lm import longest_input
    from polybit.train.spans import SpanRow

    file = squad_file(config)
    asked = choose(file.questions(), config.rows, config.seed)
    Random(config.seed).shuffle(asked)
    longest = min(config.length or 384, longest_input(model) or 384)
    held_out = config.held_out or max(1, min(200, len(asked) // 10))
    if len(asked) <= held_out:
        raise PolybitError(
            f"{len(asked)} questions cannot give {held_out} held-out ones and some to train on: add more"
        )
    answers = file.answers()

    def rows(part: Sequence[Any]) -> list[SpanRow]:
        windows = span_windows(tokenizer, part, length=longest, stride=min(128, longest // 3))
        return [
            SpanRow(window.ids, *places)
            for window, places in zip(windows, span_targets(windows, part, answers), strict=True)
        ]

    return rows(asked[held_out:]), rows(asked[:held_out])


def squad_file(config: Any):
    """The questions: a SQuAD file, or the embedded reading task."""
    import tempfile

    from polybit.data import synth
    from polybit.data.squad import SquadFile, write_squad

    if config.data == "embedded":
        folder = Path(tempfile.mkdtemp(prefix="polybit-train-"))
        items = synth.items("reading", config.rows or 1000, config.seed, split="train")
        return write_squad(folder / "train.json", items)
    if Path(config.data).suffix != ".json":
        raise PolybitError(f"--data {config.data} with --head span: give a SQuAD .json file, or embedded")
    return SquadFile(Path(config.data))


def objective(config: Any):
    """The objective over places."""
    from polybit.train.cascade import Cascade
    from polybit.train.spans import pose

    if config.consistency or config.alignment or config.switchability:
        raise PolybitError("--consistency, --alignment and --switchability belong to --head lm: leave them out")
    return Cascade(config.method, config.distance, config.beta, config.labels, teacher=config.teacher, pose=pose)
