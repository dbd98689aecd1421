"""Search the best precision of every layer at every cost, and measure whole models, since harms do not add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from polybit.allocate.frontier import FrontierPoint, Option, evolve, exact, greedy, price
from polybit.allocate.frontier import frontier as best_of
from polybit.compress.self_text import self_text
from polybit.compress.sizes import base_model, quantized_layers, stored_widths
from polybit.core.plan import Plan
from polybit.core.precision import Precision
from polybit.core.records import Run
from polybit.core.runtime import PolybitError, atomic_path, track, write_json
from polybit.data.text import read_windows
from polybit.hub.directory import output_lock
from polybit.hub.load import load_float
from polybit.hub.models import open_model, resolve
from polybit.measure.choice_kl import ChoiceMeter
from polybit.options.checks import plain
from polybit.options.frontier import FrontierOptions, preset_names
from polybit.report.frontier import frontier_figure, frontier_rows

COSTS = {"bytes": "bytes read per token", "bitops": "bit operations per token (MACs x w x a)"}
P = TypeVar("P")


def frontier(checkpoint: str, options: FrontierOptions) -> Run:
    """Search the best precision per layer of CHECKPOINT at every cost, measure it, and draw the frontier.

    Harm is the KL to the float model in nats per token. Layers are measured one at a time for the exact and the greedy
    frontier; whole choices are then measured, crossed and changed, because harms of layers do not simply add up.
    """
    run = Run("frontier", {"checkpoint": checkpoint, **plain(options)})
    with output_lock(options.out):
        with run.timed():
            run.numbers = searched(checkpoint, options)
        written(run, options)
    return run


def searched(checkpoint: str, options: FrontierOptions) -> dict[str, Any]:
    """Sensitivities, the three searches, and every whole model that was measured."""
    model, meter = prepared(checkpoint, options)
    layers = quantized_layers(model)
    keys = preset_names(options.presets)
    table = measured_table(layers, keys, options.cost, meter)
    starts = [FrontierPoint(price(table, dict.fromkeys(table, key)).choice, 0, 0, "uniform") for key in keys]
    starts += exact(table, points=options.points) + thinned(greedy(table), options.points)
    most = max(len(starts), options.evaluations + len(starts) if options.evaluations else len(starts))
    points = evolve(table, meter, start=starts, evaluations=most, seed=options.seed)
    best = {id(point) for point in best_of(points)}
    weights = {name: layer.rows * layer.columns for name, layer in layers.items()}
    return {
        "points": [
            {
                "cost": point.cost,
                "harm": point.harm,
                "predicted": price(table, point.choice).harm,
                "found_by": point.found_by,
                "best": id(point) in best,
                "name": next(iter(point.choice.values())) if point.found_by == "uniform" else "",
                "bits": mean_bits(point.choice, weights),
                "choice": dict(point.choice),
            }
            for point in points
        ],
        "sensitivities": {n: {k: o.harm for k, o in row.items()} for n, row in table.items()},
    }


def thinned(points: Sequence[P], count: int) -> list[P]:
    """About `count` points of a long frontier, ends included."""
    if len(points) <= count:
        return list(points)
    return [points[round(step * (len(points) - 1) / (count - 1))] for step in range(count)]


def mean_bits(choice: Mapping[str, str], weights: Mapping[str, int]) -> float:
    """Mean weight bits over weights."""
    return sum(Precision.parse(choice[n]).w * weights[n] for n in choice) / sum(weights.values())


def prepared(checkpoint: str, options: FrontierOptions) -> tuple[Any, ChoiceMeter]:
    """(quantized model, the meter of its harm)."""
    model, tokenizer = open_model(checkpoint, trust_remote_code=options.trust_remote_code)
    if stored_widths(model) is None:
        raise PolybitError(
            f"{checkpoint} is a float model: quantize it first, `polybit quantize {checkpoint} --out DIR`"
        )
    parent = options.reference or base_model(model)
    if parent is None:
        raise PolybitError(f"{checkpoint} does not say which model it was made from: name it with --reference")
    float_model, _ = load_float(resolve(parent), trust_remote_code=options.trust_remote_code)
    if options.text is None:
        windows_NT = self_text(
            float_model, tokenizer.bos_token_id, count=options.windows, length=options.window, seed=1
        )
    else:
        windows_NT, _ = read_windows(options.text, tokenizer, options.window, count=options.windows, seed=options.seed)
    return model, ChoiceMeter(model, float_model, windows_NT)


def measured_table(
    layers: Mapping[str, Any], keys: Sequence[str], cost: str, meter: ChoiceMeter
) -> dict[str, dict[str, Option]]:
    """Layer -> precision -> cost and harm: the KL when this layer alone has it, over that of the best precision."""
    widest = {name: f"w{layer.bits}" for name, layer in layers.items()}
    ground = meter(widest)
    table: dict[str, dict[str, Option]] = {}
    for name, layer in track(list(layers.items()), "sensitivities", total=len(layers)):
        table[name] = {}
        for key in keys:
            precision = Precision.parse(key)
            if precision.w > layer.bits:
                raise PolybitError(f"--presets names {key}, of layer {name!r:.80} only {layer.bits} bits are stored")
            harm = max(meter({**widest, name: key}) - ground, 0.0)
            table[name][key] = Option(cost_of(layer, precision, cost), harm)
    return table


def cost_of(layer: Any, precision: Precision, cost: str) -> float:
    """Bytes read of a layer per token, or its bit operations per token."""
    if cost == "bytes":
        return float(layer.planes.nbytes(precision.w))
    return float(layer.rows * layer.columns * precision.w * precision.a)


def written(run: Run, options: FrontierOptions) -> None:
    """The figure, the table, every point, and a plan per point of the frontier."""
    points = run.numbers["points"]
    label = COSTS[options.cost]
    drawn = frontier_figure(points, label, "KL to the float model, nats per token")
    for name, text in (("frontier.svg", drawn), ("frontier.md", frontier_rows(points, label))):
        with atomic_path(options.out / name) as staged:
            staged.write_text(text, encoding="utf-8")
    best = sorted((point for point in points if point["best"]), key=lambda point: point["cost"])
    for number, point in enumerate(best):
        plan = Plan(Precision(), {name: Precision.parse(key) for name, key in point["choice"].items()})
        remarks = {"cost": point["cost"], "harm": point["harm"], "unit": label}
        write_json(options.out / f"plan-{number:02d}.json", {"plan": plan.to_json(), **remarks})
    run.write(options.out / "points.json")
