"""`polybit frontier`: which precision each layer should have, for every cost – measured, not only added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from polybit.core.runtime import PolybitError
from polybit.hub.models import open_model, resolve

COSTS = {"bytes": "bytes read per token", "bitops": "bit operations per token (MACs x w x a)"}


@dataclass(frozen=True, kw_only=True)
class FrontierConfig:
    """Flags of `polybit frontier`."""

    out: Path
    """Directory for frontier.svg, frontier.md, points.json and a plan per point of the frontier."""
    presets: str = "w8,w6,w4,w3"
    """Precisions a layer may have, with commas, as in w8a8,w4a8,w4a4."""
    cost: Literal["bytes", "bitops"] = "bytes"
    """What is to be saved: bytes read per token, or bit operations (a count, not a time)."""
    text: str | None = None
    """Text to measure on (default: as polybit eval)."""
    windows: int = 16
    """Windows of text."""
    window: int = 128
    """Tokens per window."""
    points: int = 10
    """Budgets of the exact frontier."""
    evaluations: int = 60
    """Whole models the evolutionary search may measure; 0 = none."""
    reference: str | None = None
    """The float model (default: the one the checkpoint says it was made from)."""
    seed: int = 0
    """Seed of the search."""
    json: Path | None = None
    """Write the run with all its numbers there."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""


def frontier(checkpoint: str, /, *, config: Annotated[FrontierConfig, Parameter(name="*")]) -> None:
    """Search the best precision per layer of CHECKPOINT at every cost, measure it, and draw the frontier.

    Harm is the KL to the float model in nats per token. Layers are measured one at a time for the exact and the greedy
    frontier; whole choices are then measured, crossed and changed, because harms of layers do not simply add up.
    """
    from polybit.core.records import Run

    if config.points < 2 or config.windows < 1 or config.evaluations < 0:
        raise PolybitError("--points needs 2 or more, --windows 1 or more and --evaluations 0 or more")
    run = Run(
        "frontier",
        {"checkpoint": checkpoint, **{k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}},
    )
    with run.timed():
        run.numbers = search(checkpoint, config)
    write(config, run)
    best = [point for point in run.numbers["points"] if point["best"]]
    print((config.out / "frontier.md").read_text(encoding="utf-8"))
    print(f"{len(run.numbers['points'])} models measured, {len(best)} of them on the frontier: {config.out}")


def search(checkpoint: str, config: FrontierConfig) -> dict[str, Any]:
    """Sensitivities, the three searches, and every whole model that was measured."""
    from polybit.allocate.frontier import FrontierPoint, evolve, exact, greedy, price
    from polybit.allocate.frontier import frontier as best_of
    from polybit.compress.sizes import quantized_layers

    model, meter = prepare(checkpoint, config)
    layers = quantized_layers(model)
    keys = preset_names(config.presets)
    table = measured_table(layers, keys, config, meter)
    starts = [FrontierPoint(price(table, dict.fromkeys(table, key)).choice, 0, 0, "uniform") for key in keys]
    starts += exact(table, points=config.points) + greedy_some(greedy(table), config.points)
    most = max(len(starts), config.evaluations + len(starts) if config.evaluations else len(starts))
    points = evolve(table, meter.choice, start=starts, evaluations=most, seed=config.seed)
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


def preset_names(text: str) -> list[str]:
    """The precisions asked for, each once, refused when unreadable or without weight bits."""
    from polybit.core.precision import FLOAT, Precision

    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if len(found) < 2:
        raise PolybitError(f"--presets {text!r:.60} leaves nothing to choose: give two precisions or more")
    for name in found:
        if Precision.parse(name).w == FLOAT:
            raise PolybitError(f"--presets names {name!r}, which quantizes no weight: give widths such as w8 or w4a8")
    return found


def greedy_some(points: Sequence[Any], count: int) -> list[Any]:
    """About `count` points of a long frontier, ends included."""
    if len(points) <= count:
        return list(points)
    return [points[round(step * (len(points) - 1) / (count - 1))] for step in range(count)]


def mean_bits(choice: Mapping[str, str], weights: Mapping[str, int]) -> float:
    """Mean weight bits over weights."""
    from polybit.core.precision import Precision

    return sum(Precision.parse(choice[n]).w * weights[n] for n in choice) / sum(weights.values())


class Meter:
    """KL to the float model of a model at any choice of precisions, nats per token over the windows."""

    def __init__(self, model, float_model, windows_NT) -> None:
        import torch

        self.model, self.batches = model, list(windows_NT.split(8))
        with torch.no_grad():
            self.wanted = [torch.log_softmax(float_model(input_ids=ids).logits.float(), -1) for ids in self.batches]

    def choice(self, choice: Mapping[str, str]) -> float:
        """Mean KL at a choice."""
        import torch

        from polybit.core.plan import Plan
        from polybit.core.precision import Precision
        from polybit.nn.switch import at, keep_decoded

        plan = Plan(Precision(), {name: Precision.parse(key) for name, key in choice.items()})
        total, count = 0.0, 0
        with torch.no_grad(), at(self.model, plan), keep_decoded(self.model):
            for ids, wanted_BTV in zip(self.batches, self.wanted, strict=True):
                given_BTV = torch.log_softmax(self.model(input_ids=ids).logits.float(), -1)
                total += float((wanted_BTV.exp() * (wanted_BTV - given_BTV)).sum())
                count += ids.numel()
        return total / count


def prepare(checkpoint: str, config: FrontierConfig):
    """(quantized model, the meter of its harm)."""
    from polybit.compress.self_text import self_text
    from polybit.compress.sizes import base_model, stored_widths
    from polybit.data.text import read_windows
    from polybit.hub.load import load_float

    model, tokenizer = open_model(checkpoint, trust_remote_code=config.trust_remote_code)
    if stored_widths(model) is None:
        raise PolybitError(
            f"{checkpoint} is a float model: quantize it first, `polybit quantize {checkpoint} --out DIR`"
        )
    parent = config.reference or base_model(model)
    if parent is None:
        raise PolybitError(f"{checkpoint} does not say which model it was made from: name it with --reference")
    float_model, _ = load_float(resolve(parent), trust_remote_code=config.trust_remote_code)
    if config.text is None:
        windows_NT = self_text(float_model, tokenizer.bos_token_id, count=config.windows, length=config.window, seed=1)
    else:
        windows_NT, _ = read_windows(config.text, tokenizer, config.window, count=config.windows, seed=config.seed)
    return model, Meter(model, float_model, windows_NT)


def measured_table(layers: Mapping[str, Any], keys: Sequence[str], config: FrontierConfig, meter: Meter):
    """Layer -> precision -> cost and harm: the KL when this layer alone has it, over that of the best precision."""
    from polybit.allocate.frontier import Option
    from polybit.core.precision import Precision
    from polybit.core.runtime import track

    widest = {name: f"w{layer.bits}" for name, layer in layers.items()}
    ground = meter.choice(widest)
    table: dict[str, dict[str, Option]] = {}
    for name, layer in track(list(layers.items()), "sensitivities", total=len(layers)):
        table[name] = {}
        for key in keys:
            precision = Precision.parse(key)
            if precision.w > layer.bits:
                raise PolybitError(f"--presets names {key}, of layer {name!r:.80} only {layer.bits} bits are stored")
            harm = max(meter.choice({**widest, name: key}) - ground, 0.0)
            table[name][key] = Option(cost_of(layer, precision, config.cost), harm)
    return table


def cost_of(layer, precision, cost: str) -> float:
    """Bytes read of a layer per token, or its bit operations per token."""
    if cost == "bytes":
        return float(layer.planes.nbytes(precision.w))
    return float(layer.rows * layer.columns * precision.w * precision.a)


def write(config: FrontierConfig, run) -> None:
    """The figure, the table, every point, and a plan per point of the frontier."""
    from polybit.core.plan import Plan
    from polybit.core.precision import Precision
    from polybit.core.runtime import atomic_path, write_json
    from polybit.report.frontier import frontier_figure, frontier_rows

    points = run.numbers["points"]
    label = COSTS[config.cost]
    drawn = frontier_figure(points, label, "KL to the float model, nats per token")
    for name, text in (("frontier.svg", drawn), ("frontier.md", frontier_rows(points, label))):
        with atomic_path(config.out / name) as staged:
            staged.write_text(text, encoding="utf-8")
    best = sorted((point for point in points if point["best"]), key=lambda point: point["cost"])
    for number, point in enumerate(best):
        plan = Plan(Precision(), {name: Precision.parse(key) for name, key in point["choice"].items()})
        remarks = {"cost": point["cost"], "harm": point["harm"], "unit": label}
        write_json(config.out / f"plan-{number:02d}.json", {"plan": plan.to_json(), **remarks})
    run.write(config.out / "points.json")
    if config.json is not None:
        run.write(config.json)
