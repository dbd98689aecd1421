"""Say what a token costs at each precision: counted, read, measured."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from polybit.compress.sizes import default_presets, preset_sizes, stored_widths
from polybit.core.cost import Cost, agreements, bitops_of
from polybit.core.plan import Plan
from polybit.core.records import Run
from polybit.core.runtime import PolybitError
from polybit.hub.cache import keep_packed
from polybit.hub.lm import longest_input
from polybit.hub.models import open_model
from polybit.nn.switch import at
from polybit.options.checks import names_of, plain
from polybit.options.cost import CostOptions
from polybit.speed.steps import cache_filled, milliseconds
from polybit.speed.work import everything, float_bytes, model_bitops


def cost(target: str, options: CostOptions) -> Run:
    """What a token of TARGET (a polybit directory) costs at each precision, and how far the rankings agree."""
    run = Run("cost", {"target": target, **plain(options)})
    with run.timed():
        model, _ = open_model(target)
        if stored_widths(model) is None:
            raise PolybitError(f"{target} is a float model, which has one precision only: quantize it first")
        room = longest_input(model)
        if room is not None and options.context + options.steps > room:
            raise PolybitError(
                f"--context {options.context} and --steps {options.steps} exceed the {room} tokens the model reads: "
                "ask for fewer"
            )
        presets = list(dict.fromkeys(names_of(options.precision) or default_presets(model)))
        rows = costs(model, presets, context=options.context, steps=options.steps, rounds=options.rounds)
        in_float = [(work, Plan().default) for work in everything(model, options.context)]
        run.numbers = {
            "precisions": {row.name: row.to_json() for row in rows},
            "float_bitops_per_token": bitops_of(in_float),
            "rank_correlation": agreements(rows),
        }
    return run


def costs(model: nn.Module, presets: Sequence[str], *, context: int, steps: int, rounds: int = 1) -> list[Cost]:
    """One Cost per preset; steps: tokens timed per preset and round, 0 = none."""
    keep_packed(model)
    caches, bitops = {}, {}
    for preset in presets:
        with at(model, preset):
            caches[preset] = cache_filled(model, context)
            bitops[preset] = model_bitops(model, context)
    times = milliseconds(model, presets, context=context, steps=steps, rounds=rounds) if steps else {}
    sizes, rest = preset_sizes(model, presets), float_bytes(model)
    return [Cost(p, bitops[p], sizes[p]["bytes"] + rest, caches[p], context, times.get(p)) for p in presets]
