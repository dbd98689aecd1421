"""Find the mixture of texts to calibrate on, from one forward pass per text; and measure whether that is true."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from polybit.acts.float_source import FloatSource, is_own_text, open_fitting, writer
from polybit.compress.loop import Codes, compress
from polybit.compress.mix_files import about
from polybit.compress.recipe import choose
from polybit.compress.source import SourceName
from polybit.compress.text import BATCH, batches, gather, window_length
from polybit.core.journal import Journal
from polybit.core.records import Run
from polybit.hub.models import resolve
from polybit.hub.workers import Where, spread
from polybit.measure.mixture import search_mixtures, simplex
from polybit.measure.mixture_truth import Harms, MixtureMeter, judge, measure_mixtures
from polybit.measure.table import CRITERIA
from polybit.nn.convert import Target, targets
from polybit.options.checks import plain
from polybit.options.mix import MixOptions

VERIFY_STEP = {2: 0.25, 3: 0.5}  # distance of the mixtures that are quantized; 1 beyond, the sources by themselves
HELD_OUT = 24  # windows of each text to measure on
DRAWS = 4  # verifying reads this many times the windows it calibrates on, so that every seed draws others
UNDECIDING = (
    "json",
    "restart",
    "seeds",
    "criterion",
    "step",
    "workers",
    "ray",
    "device",
    "memory",
)  # options that change nothing of one measurement


def mix(model: str, options: MixOptions) -> Run:
    """Find the mixture of texts MODEL (a local path, a hub id, or tinychat) is best calibrated on.

    The shares under `mixture`, `best`, `weights` of the numbers are what `quantize` takes as `mix`.
    """
    run = Run("mix", {"model": model, **plain(options)})
    with run.timed():
        run.numbers = searched(model, options)
    if options.json is not None:
        run.write(options.json)
    return run


def searched(name: str, options: MixOptions) -> dict[str, Any]:
    """Load, read the texts, search, and verify when asked."""
    source = open_fitting(name, options, models=Where(options.workers, options.ray).models)
    chosen = targets(source.model)
    writes = any(is_own_text(text, embedded=False) for text in (*options.general, *options.tasks))
    with writer(name, source, options, writes=writes) as author:
        windows, held_out = read_texts(author, source.tokenizer, options)
    found = search_mixtures(
        source.model,
        {source: list(cut[: options.samples].split(4)) for source, cut in windows.items()},
        chosen,
        general=options.general,
        criteria=tuple(CRITERIA) if options.verify else (options.criterion,),
        normalise=options.normalise,
        family={source: list(kept.split(4)) for source, kept in held_out.items()},
        step=options.step,
        **source.where,
    )
    numbers: dict[str, Any] = {"mixture": found[options.criterion].to_json()}
    if options.verify:
        numbers["others"] = {c: m.to_json()["best"] for c, m in found.items() if c != options.criterion}
        numbers["curves"] = {criterion: m.to_json()["curve"] for criterion, m in found.items()}
        picks = {criterion: m.best.weights for criterion, m in found.items()}
        numbers["verified"] = verified(name, source, chosen, windows, held_out, picks, options)
    return numbers


def read_texts(model, tokenizer, options: MixOptions) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Windows by source, to calibrate on and to measure on, [N, T] each, all of one length."""
    length = window_length(model, options.window)
    samples = options.samples * (DRAWS if options.verify else 1)
    windows, held_out = {}, {}
    for source in (*options.general, *options.tasks):
        with about(source):
            part = gather(
                model, tokenizer, source, samples=samples, length=length, seed=options.seed, held_out=HELD_OUT
            )
        windows[source], held_out[source] = part.windows_NT, part.held_out_MT
    return windows, held_out


def verified(
    name: str,
    source: FloatSource,
    chosen: Sequence[Target],
    windows: Mapping[str, Tensor],
    held_out: Mapping[str, Tensor],
    picks: Mapping[str, tuple[float, ...]],
    options: MixOptions,
) -> dict[str, Any]:
    """Quantize at a coarse grid and at every criterion's pick; the measured table and the regrets."""
    shortest = min(len(cut) for cut in windows.values())
    samples = min(options.samples, max(1, shortest // 2))
    if samples < options.samples:
        print(
            f"polybit: warning: --verify calibrates on {samples} windows: the shortest text gives {shortest}, "
            "and every seed must draw others",
            file=sys.stderr,
        )
    grid = [tuple(row) for row in simplex(len(windows), VERIFY_STEP.get(len(windows), 1.0)).tolist()]
    points = [*grid, *(point for point in dict.fromkeys(picks.values()) if point not in grid)]
    fingerprint = {key: value for key, value in plain(options).items() if key not in UNDECIDING}
    fingerprint |= {"model": source.digest(), "samples": samples}
    base = options.json or Path(f"mix-{Path(name).name}.json")
    journal = Journal(base.with_name(f"{base.name}.partial"), fingerprint, restart=options.restart)
    found = measure_mixtures(
        source.model,
        chosen,
        windows,
        held_out,
        points,
        quantizer(source.model, source.where, chosen, options),
        samples=samples,
        seeds=range(options.seed, options.seed + options.seeds),
        keep=journal.put,
        kept=journal.done,
        share=lambda meter, tasks: spread(
            mixture_meter,
            (source.by_name(name, options), windows, held_out, samples, options),
            tasks,
            where=Where(options.workers, options.ray),
            here=meter,
            models=[resolve(name)],
        ),
        **source.where,
    )
    result = judge(list(windows), found, picks)
    journal.remove()
    return result


def mixture_meter(
    name: SourceName, windows: Mapping[str, Tensor], held_out: Mapping[str, Tensor], samples: int, options: MixOptions
) -> MixtureMeter:
    """What measures mixtures in a worker."""
    model, where = name.open()
    chosen = targets(model)
    harms = Harms(model, chosen, held_out, **where)
    return MixtureMeter(harms, windows, quantizer(model, where, chosen, options), samples)


def quantizer(
    model: Any, where: Mapping[str, Any], chosen: Sequence[Target], options: MixOptions
) -> Callable[[Tensor, int], Iterable[Codes]]:
    """(windows, seed) -> the codes `quantize` would make, block by block."""
    recipe = choose(
        options.method, (options.bits,), options.group_size, asymmetric=None, effort="normal", seed=options.seed
    )

    def quantize(windows_NT: Tensor, seed: int) -> Iterable[Codes]:
        return compress(model, chosen, batches(windows_NT, BATCH), replace(recipe, seed=seed), **where)

    return quantize
