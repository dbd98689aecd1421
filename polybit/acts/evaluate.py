"""Measure what each width of a checkpoint costs against its float model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from polybit.acts.evaluate_blockwise import BlockwiseLM, noted_base, of_text_alone, open_blockwise
from polybit.acts.evaluate_material import gather_material
from polybit.acts.evaluate_suites import EvalPair, span_numbers
from polybit.acts.float_source import loaded_bytes
from polybit.compress.sizes import base_model, default_presets, preset_sizes, stored_widths
from polybit.core.memory import fits
from polybit.core.parts import load
from polybit.core.records import Run
from polybit.core.runtime import PolybitError
from polybit.evals.compare import compare
from polybit.evals.sharing import Here, PairWorker, Readers, Share
from polybit.evals.table import SUITES
from polybit.hub.lm import LocalLM
from polybit.hub.models import device_of, is_embedded, open_model, resolve
from polybit.hub.workers import Team, Where
from polybit.options.checks import names_of, plain
from polybit.options.evaluate import WINDOWS, EvalOptions

PIECES = 8  # parts of the text for each worker, so that none waits long for the last


def evaluate(model: str, options: EvalOptions) -> Run:
    """Compare MODEL (a polybit directory or any model) with its float reference, paired and with intervals."""
    if options.with_text and options.windows is None:
        options = replace(options, windows=WINDOWS)
    run = Run("eval", {"target": model, **plain(options), "target_name": Path(model).name})
    with run.timed():
        if options.squad_head == "span":
            run.numbers = {"squad": span_numbers(model, options)}
        else:
            pair, reference_name = open_pair(model, options)
            if isinstance(pair.quantized, BlockwiseLM):
                run.config["blockwise"] = True
                options = of_text_alone(model, options, embedded=is_embedded(reference_name))
            with pair.share.team if isinstance(pair.share, Readers) else nullcontext():
                run.numbers, text_name = measure(pair, options, embedded=is_embedded(reference_name))
            run.config |= {"reference_name": Path(reference_name).name, "text_name": text_name}
    return run


def open_pair(target: str, options: EvalOptions) -> tuple[EvalPair, str]:
    """Both models, the precisions to measure, and the name of the reference."""
    blockwise = too_large(target, options)
    ours = opened(target, options, blockwise=blockwise)
    model = ours.model
    widths = stored_widths(model)
    named = options.reference or base_model(model)
    if named is None:
        if widths is not None:
            raise PolybitError(f"{target} does not say which model it was made from: name it with --reference")
        named = target
    asked = list(dict.fromkeys(names_of(options.precision)))  # one that is named twice is measured once
    if widths is None and asked:
        raise PolybitError(
            f"--precision {options.precision}: {target} is a float model without stored widths; quantize it first"
        )
    theirs = ours if named == target else opened(named, options, blockwise=blockwise)
    if stored_widths(theirs.model) is not None:
        raise PolybitError(f"the reference {named} is itself quantized: give the float model it was made from")
    presets: list[str | None] = list(asked or (default_presets(model) if widths else ())) or [None]
    sizes: Mapping[str, Any] = preset_sizes(model, [p for p in presets if p]) if widths else {}
    share = sharing(theirs, ours, target, named, options, blockwise=blockwise)
    return EvalPair(theirs, ours, tuple(presets), sizes, share), named


def sharing(theirs: LocalLM, ours: LocalLM, target: str, named: str, options: EvalOptions, *, blockwise: bool) -> Share:
    """Who reads: this process, or workers that open both models by their names."""
    where = Where(options.workers, options.ray)
    if where.alone:
        return Here(theirs, ours)
    names = [resolve(named), resolve(target)]
    here = PairWorker(lambda: (theirs, ours))
    team = Team(PairWorker, (both, target, named, options, blockwise), where, here=here, models=names)
    return Readers(team, where.workers * (1 if blockwise else PIECES))


def both(target: str, named: str, options: EvalOptions, blockwise: bool) -> tuple[LocalLM, LocalLM]:
    """Both models in a worker, the reference first."""
    theirs, ours = (opened(name, options, blockwise=blockwise) for name in (named, target))
    return theirs, ours


def too_large(target: str, options: EvalOptions) -> bool:
    """Whether both models together, of each worker too, do not fit into memory; never said of a GPU's."""
    if device_of(options.device).type != "cpu":
        return False
    trust = options.trust_remote_code
    named = options.reference or noted_base(target, trust_remote_code=trust) or target
    both = sum(loaded_bytes(resolve(name), trust_remote_code=trust) for name in (target, named))
    return not fits(both * Where(options.workers, options.ray).models, options.memory)


def opened(name: str, options: EvalOptions, *, blockwise: bool) -> LocalLM:
    """A model with its tokenizer, in memory, or read from its files block by block where that is possible."""
    found = open_blockwise(resolve(name), options) if blockwise else None
    if found is not None:
        return found
    return LocalLM(*open_model(name, trust_remote_code=options.trust_remote_code, device=options.device))


def measure(pair: EvalPair, options: EvalOptions, *, embedded: bool) -> tuple[dict[str, Any], str]:
    """All that was asked for, and the name of the text; embedded: the reference is the embedded model."""
    numbers: dict[str, Any] = {}
    text_name = ""
    if options.with_text or options.tasks:
        material, text_name = gather_material(pair.reference, options, embedded=embedded)
        numbers = compare(
            pair.reference,
            pair.quantized,
            pair.presets,
            material,
            sizes=pair.sizes,
            breakdown=options.breakdown,
            seed=options.seed,
            share=pair.share,
        )
    for name in options.suites:
        if (path := SUITES[name].measure) is not None:
            numbers[name] = load(path)(pair, options)
    return numbers, text_name
