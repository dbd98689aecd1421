"""`polybit bench`: how fast this machine runs every width, beside what else can run the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from polybit.commands.flags import Json, can_be_written, keep
from polybit.core.runtime import atomic_path
from polybit.options.bench import BenchOptions
from polybit.report.speed import show, speed_against_bits, written

Chart = Annotated[Path | None, Parameter(help="Write the figure there (SVG).", validator=can_be_written("--chart"))]


def bench(
    what: Literal["linear", "generate", "switch"],
    model: str | None = None,
    /,
    *,
    options: Annotated[BenchOptions, Parameter(name="*")] = BenchOptions(),
    chart: Chart = None,
    json: Json = None,
) -> None:
    """Measure speed: WHAT is linear (one product), generate (tokens per second), or switch (changing the width).

    MODEL is a polybit checkpoint; without one a random Llama of half a billion weights is timed. Everything runs in one
    interleaved run, because a shared machine's speed drifts: trust the ratios and shares before the absolute numbers.
    """
    from polybit.acts.bench import bench as act

    run = act(what, model, options)
    keep(run, json)
    show(what, run.numbers, run.config)
    if chart is not None and what != "switch":
        text = speed_against_bits(written(run.numbers["rows"]), "tokens" if what == "generate" else "calls")
        with atomic_path(chart) as staged:
            staged.write_text(text, encoding="utf-8")
        print(f"{chart}: written")
