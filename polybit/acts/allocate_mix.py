"""`allocate --mix auto`: the shares in which the texts of a plan are calibrated on, searched before its layers are
read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from polybit.acts.float_source import FloatSource
from polybit.compress import text
from polybit.compress.mix_files import draw
from polybit.core.runtime import PolybitError
from polybit.data.answers import encode_task, read_task
from polybit.data.text import windows
from polybit.measure.mixture import Mixture, search_mixtures
from polybit.measure.probe_texts import ProbePair
from polybit.measure.quantizing import Quantizing
from polybit.nn.convert import Target
from polybit.options.allocate import AUTO_MIX, AllocateOptions

CRITERION = "family"  # the default of polybit mix
SHORTEST_ITEM = 16  # tokens; bounds how many items are read for so many windows


def refuse_idle(options: AllocateOptions, tasks: Sequence[str], quantizing: Quantizing) -> None:
    """Say where a mixture would decide nothing, before anything is measured."""
    if options.mix != AUTO_MIX:
        return
    if not tasks:
        raise PolybitError("--mix auto weighs tasks against general text, and there is no task: name some with --tasks")
    if not quantizing.needs_stats:
        raise PolybitError(
            f"--mix auto chooses text to calibrate on, and --method {options.method} reads none: leave --mix out, or "
            "use --method gptq"
        )


def mixed(
    float_source: FloatSource,
    chosen: Sequence[Target],
    general: dict[str, ProbePair],
    tasks: dict[str, ProbePair],
    options: AllocateOptions,
) -> tuple[tuple[Tensor, ...], Mixture]:
    """(batches to calibrate on, how the shares were chosen); the keys are the texts as they were named.

    A task is its questions and answers one after another, without those that prove the plan. Where a text is too short
    for its share, fewer windows are drawn of all.
    """
    pools: dict[str, Tensor] = {}
    family: dict[str, list[Tensor]] = {}
    for name, pair in general.items():
        pools[name], family[name] = torch.cat(pair.calibration), list(pair.proof.ids)
    length = next(iter(pools.values())).shape[1]
    for name, pair in tasks.items():
        pool_NT = task_windows(float_source.tokenizer, name, pair, length, options)
        kept = max(1, len(pool_NT) // 5)
        pools[name], family[name] = pool_NT[:-kept], list(pool_NT[-kept:].split(text.BATCH))
    found = search_mixtures(
        float_source.model,
        {name: text.batches(pool_NT[: options.samples], text.BATCH) for name, pool_NT in pools.items()},
        chosen,
        general=list(general),
        criteria=(CRITERION,),
        family=family,
        **float_source.where,
    )[CRITERION]
    shares = {name: share for name, share in found.weights.items() if share > 0}
    fits = int(min(len(pools[name]) * sum(shares.values()) / share for name, share in shares.items()) + 1e-6)
    count = max(1, min(options.calibration_samples, fits - len(shares)))  # shares are rounded to whole windows
    if count < options.calibration_samples:
        print(
            f"polybit: warning: --mix auto calibrates on {count} windows of {length} tokens instead of "
            f"{options.calibration_samples}: the shortest text gives no more",
            file=sys.stderr,
        )
    drawn_NT = draw(pools, shares, count, seed=options.seed)
    return tuple(text.batches(drawn_NT, text.BATCH)), found


def task_windows(tokenizer: Any, source: str, pair: ProbePair, length: int, options: AllocateOptions) -> Tensor:
    """Windows [N, T] of a task's items; at least two are needed, one to calibrate on and one to aim at."""
    most = options.calibration_samples * length
    proving = {tuple(row) for ids_BT in pair.proof.ids for row in ids_BT.tolist()}
    task = read_task(source, count=-(-most // SHORTEST_ITEM), seed=options.seed)
    stream: list[int] = []
    for ids, _ in encode_task(tokenizer, task):
        if not any(row[: len(ids)] == tuple(ids) for row in proving):
            stream += ids
        if len(stream) >= 2 * most:
            break
    if len(stream) < 2 * length:
        raise PolybitError(
            f"--mix auto needs two windows of {length} tokens of every text, and the task {source!r} gives "
            f"{len(stream)} tokens: name a longer one, or give a smaller --window"
        )
    return windows(torch.tensor(stream), length, bos=tokenizer.bos_token_id, seed=options.seed)
