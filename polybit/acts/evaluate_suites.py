"""What `eval` measures on request, a function for each of SUITES in evals/table.py."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polybit.compress.sizes import quantized_layers
from polybit.core.runtime import PolybitError
from polybit.data.squad import open_squad
from polybit.evals.choices import choice_sets, compare_choices
from polybit.evals.drift import drift, talk_scripts
from polybit.evals.sharing import Here, PairWorker, Readers, Share
from polybit.evals.squad import compare_squad
from polybit.hub.lm import LocalLM
from polybit.hub.models import resolve
from polybit.hub.span import SpanReader, load_span
from polybit.hub.workers import Team, Where
from polybit.options.checks import names_of
from polybit.options.evaluate import EvalOptions


@dataclass(frozen=True, slots=True)
class EvalPair:
    """The float model, the quantized one, the precisions to measure it at, their sizes by name, and who reads."""

    reference: LocalLM
    quantized: LocalLM
    presets: tuple[str | None, ...]
    sizes: Mapping[str, Mapping[str, Any]]
    share: Share


def choices(pair: EvalPair, options: EvalOptions) -> dict[str, Any]:
    """Multiple choice by log-likelihood, GSM8K by generation."""
    sets = choice_sets(
        names_of(options.choices),
        shown=names_of(options.shots_from) if options.shots else (),
        limit=options.choice_items,
        form=options.form,
        shots=options.shots,
    )
    return compare_choices(pair.reference, pair.quantized, pair.presets, sets, seed=options.seed, share=pair.share)


def lm_eval(pair: EvalPair, options: EvalOptions) -> dict[str, Any]:
    """lm-eval's tasks through the bridge."""
    try:
        from polybit.evals.lm_eval_bridge import compare_tasks
    except ImportError as error:
        raise PolybitError(f"--lm-eval needs lm-eval ({error}): run pip install 'polybit[lm-eval]'") from error
    return compare_tasks(
        pair.reference,
        pair.quantized,
        pair.presets,
        names_of(options.lm_eval),
        include=None if options.lm_eval_path is None else Path(options.lm_eval_path),
        limit=options.choice_items,
        shots=options.shots or None,
        seed=options.seed,
        share=pair.share,
    )


def talk(pair: EvalPair, options: EvalOptions) -> dict[str, Any]:
    """Drift of the answers over long conversations."""
    scripts = talk_scripts(options.talks, count=options.talk_count, turns=options.talk, seed=options.seed)
    return drift(
        pair.reference,
        pair.quantized,
        pair.presets,
        scripts,
        max_tokens=options.max_tokens,
        seed=options.seed,
        share=pair.share,
    )


def squad(pair: EvalPair, options: EvalOptions) -> dict[str, Any]:
    """Questions of a SQuAD file, answered in free text."""
    views: dict[str, tuple[bool, str | None]] = {"float": (True, None)}
    views |= {preset or "as loaded": (False, preset) for preset in pair.presets}
    return answered(views, options, pair.share, reference="float")


def span_numbers(target: str, options: EvalOptions) -> dict[str, Any]:
    """A model with a span head, at every precision asked for; a float model as it is."""
    reader, _ = span_readers(target)
    wanted = names_of(options.precision)
    if wanted and not quantized_layers(reader.model):
        raise PolybitError(
            f"--precision {options.precision}: {target} is a float model without stored widths; quantize it first"
        )
    views: dict[str, tuple[bool, str | None]] = {name: (False, name) for name in wanted}
    where = Where(options.workers, options.ray)
    with Team(PairWorker, (span_readers, target), where, models=[resolve(target)]) as team:
        share = Here(reader, reader) if where.alone else Readers(team, where.workers)
        return answered(views or {"float": (True, None)}, options, share, reference=None)


def span_readers(target: str) -> tuple[SpanReader, SpanReader]:
    """A model with a span head in the place of both models of a pair."""
    reader = SpanReader(*load_span(resolve(target)))
    return reader, reader


def answered(
    views: Mapping[str, tuple[bool, str | None]], options: EvalOptions, share: Share, *, reference: str | None
) -> dict[str, Any]:
    """Answers of every view, frozen, then scored."""
    folder = options.predictions or Path(tempfile.mkdtemp(prefix="polybit-squad-"))
    file = open_squad(str(options.squad), folder, count=options.squad_items)
    return compare_squad(
        views,
        share,
        file,
        folder,
        count=options.squad_items,
        head=options.squad_head,
        reference=reference,
        seed=options.seed,
    )
