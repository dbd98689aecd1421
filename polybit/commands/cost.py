"""`polybit cost`: what every precision of a checkpoint costs - BitOPs, bytes read, measured time - side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from polybit.compress.sizes import preset_sizes, quantized_layers, stored_widths
from polybit.core.cost import Cost, Work, bitops_of
from polybit.core.plan import Plan
from polybit.core.runtime import PolybitError
from polybit.hub.models import open_model


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """Flags of `polybit cost`."""

    precision: str | None = None
    """Precisions with commas, as in w8,w4,w4a8k4v4 (default: every stored width)."""
    context: int = 256
    """Tokens already read when the token that is counted comes."""
    steps: int = 24
    """Tokens timed per precision and round; 0 = measure no time."""
    rounds: int = 3
    """Rounds in which all precisions take turns, so that a drifting machine is fair to all."""
    json: Path | None = None
    """Write all numbers there."""


def cost(target: str, /, *, config: Annotated[CostConfig, Parameter(name="*")] = CostConfig()) -> None:
    """Say what a token of TARGET (a polybit directory) costs at each precision, in three units that are no synonyms."""
    for flag, value, least in (
        ("context", config.context, 1),
        ("steps", config.steps, 0),
        ("rounds", config.rounds, 1),
    ):
        if value < least:
            raise PolybitError(f"--{flag} {value} is not possible: give {least} or more")
    from polybit.core.records import Run, machine

    run = Run("cost", {"target": target, **asdict(config), "json": str(config.json or "")})
    with run.timed():
        run.numbers = measure(target, config)
    print(table(run.numbers))
    if config.steps:
        print(f"measured on {machine()['processor']}, {machine()['threads']} thread(s)")
    if config.json is not None:
        run.write(config.json)
        print(f"All numbers: {config.json}")


def measure(target: str, config: CostConfig) -> dict[str, Any]:
    """Costs of every precision, and how far their rankings agree."""
    from polybit.hub.lm import longest_input

    model, _ = open_model(target)
    widths = stored_widths(model)
    if widths is None:
        raise PolybitError(f"{target} is a float model, which has one precision only: quantize it first")
    room = longest_input(model)
    if room is not None and config.context + config.steps > room:
        raise PolybitError(
            f"--context {config.context} and --steps {config.steps} exceed the {room} tokens the model reads: "
            "ask for fewer"
        )
    presets = [name.strip() for name in (config.precision or "").split(",") if name.strip()]
    presets = list(dict.fromkeys(presets or [f"w{bits}" for bits in widths]))
    rows = costs(model, presets, config)
    return {
        "precisions": {row.name: row.to_json() for row in rows},
        "float_bitops_per_token": bitops_of([(work, Plan().default) for work in everything(model, config.context)]),
        "rank_correlation": agreements(rows),
    }


def costs(model: Any, presets: Sequence[str], config: CostConfig) -> list[Cost]:
    """One Cost per preset."""
    from polybit.hub.cache import keep_packed
    from polybit.nn.switch import at

    keep_packed(model)
    caches = {}
    for preset in presets:
        with at(model, preset):
            caches[preset] = filled(model, config.context)
    times = timings(model, presets, config) if config.steps else {}
    sizes = preset_sizes(model, presets)
    rest = float_bytes(model)
    found = []
    for preset in presets:
        with at(model, preset):
            bitops = model_bitops(model, config.context)
        found.append(
            Cost(preset, bitops, sizes[preset]["bytes"] + rest, caches[preset], config.context, times.get(preset))
        )
    return found


def attention_work(model: Any, context: int) -> list[tuple[str, Work, Work]]:
    """(attention layer, its scores, its mixing of values) of a token that sees `context` tokens."""
    from polybit.nn.attention import attention_layers

    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or config.num_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    macs = float(heads * size * context)
    return [(name, Work("scores", macs, "qk"), Work("values", macs, "pv")) for name in attention_layers(model)]


def linear_macs(model: Any, layer: Any, name: str) -> float:
    """Multiply-adds of a quantized layer for one token; of fused experts only those that are chosen work."""
    config = model.config.get_text_config()
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    chosen = getattr(config, "num_experts_per_tok", 1) / experts if experts and ".experts." in f".{name}." else 1.0
    lookup = getattr(layer, "kind", "linear") == "embedding" and model.get_output_embeddings() is None
    return 0.0 if lookup else layer.rows * layer.columns * chosen


def float_head(model: Any) -> float:
    """Multiply-adds of an output head left in float."""
    from polybit.nn.linear import QuantWeight, TiedHead

    head = model.get_output_embeddings()
    return 0.0 if head is None or isinstance(head, (QuantWeight, TiedHead)) else float(head.weight.numel())


def everything(model: Any, context: int) -> list[Work]:
    """All the work of a token."""
    found = [Work(name, linear_macs(model, layer, name)) for name, layer in quantized_layers(model).items()]
    found += [work for _, scores, values in attention_work(model, context) for work in (scores, values)]
    return [*found, Work("head", float_head(model))]


def model_bitops(model: Any, context: int) -> float:
    """BitOPs of a token at the precision the model has now."""
    from polybit.core.precision import Precision
    from polybit.nn.attention import operands_of

    layers = quantized_layers(model)
    work = [(Work(n, linear_macs(model, m, n)), Precision(w=m.width, a=m.precision.a)) for n, m in layers.items()]
    operands = operands_of(model)
    for name, scores, values in attention_work(model, context):
        precision = operands.get(name, Precision())
        work += [(scores, precision), (values, precision)]
    return bitops_of([*work, (Work("head", float_head(model)), Precision())])


def float_bytes(model: Any) -> float:
    """Bytes of float weights a token reads: all of them, but one row of an input embedding that is no output head."""
    stored = {id(p) for layer in quantized_layers(model).values() for p in layer.parameters(recurse=False)}
    head = getattr(model.get_output_embeddings(), "weight", None)
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    total = 0
    for parameter in model.parameters():
        if id(parameter) in stored:
            continue
        rows = 1 if parameter is embedding and parameter is not head else parameter.shape[0] if parameter.ndim else 1
        total += parameter[:rows].numel() * parameter.element_size() if parameter.ndim else parameter.element_size()
    return float(total)


def filled(model: Any, context: int) -> float:
    """Bytes a cache of `context` tokens holds at the precision the model has now."""
    import torch

    from polybit.hub.cache import cache_bytes

    with torch.inference_mode():
        out = model(torch.ones(1, context, dtype=torch.int64), use_cache=True)
    return float(cache_bytes(out.past_key_values))


def timings(model: Any, presets: Sequence[str], config: CostConfig) -> dict[str, tuple[float, float, float]]:
    """Median, 10th and 90th percentile of the milliseconds of a token, precisions taking turns."""
    import torch

    from polybit.nn.switch import at, multiply_by

    multiply_by(model)  # the compiled kernels, as `polybit generate` uses them
    seconds: dict[str, list[float]] = {preset: [] for preset in presets}
    token = torch.ones(1, 1, dtype=torch.int64)
    for _ in range(config.rounds):
        for preset in presets:
            with at(model, preset), torch.inference_mode():
                cache = model(torch.ones(1, config.context, dtype=torch.int64), use_cache=True).past_key_values
                for _ in range(config.steps):
                    started = time.perf_counter()
                    model(token, past_key_values=cache, use_cache=True)
                    seconds[preset].append(1000 * (time.perf_counter() - started))
    found = {}
    for preset, values in seconds.items():
        tenths = statistics.quantiles(values, n=10) if len(values) > 1 else [values[0]] * 9
        found[preset] = statistics.median(values), tenths[0], tenths[-1]
    return found


def agreements(rows: Sequence[Cost]) -> dict[str, float]:
    """Spearman's rank correlation of each pair of costs over the precisions; empty for fewer than three."""
    columns = {"bitops": [row.bitops for row in rows], "bytes": [row.bytes for row in rows]}
    if all(row.ms is not None for row in rows):
        columns["ms"] = [row.ms[0] for row in rows if row.ms is not None]
    names = list(columns)
    if len(rows) < 3:
        return {}
    return {
        f"{one} and {other}": spearman(columns[one], columns[other])
        for n, one in enumerate(names)
        for other in names[n + 1 :]
    }


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Correlation of ranks, equal values sharing their mean rank; 0 where one side is constant."""

    def ranks(values: Sequence[float]) -> list[float]:
        return [sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2 for value in values]

    a, b = ranks(one), ranks(other)
    return statistics.correlation(a, b) if len(set(a)) > 1 and len(set(b)) > 1 else 0.0


def table(numbers: dict[str, Any]) -> str:
    """The three costs as lines for a terminal."""
    lines = [f"{'':<14}{'BitOPs/token':>16}{'of FP32':>10}{'bytes/token':>14}{'of them cache':>15}{'ms/token':>22}"]
    for name, row in numbers["precisions"].items():
        read = row["bytes_per_token"]
        ms = row["ms_per_token"]
        timed = f"{ms['median']:.2f} ({ms['p10']:.2f}-{ms['p90']:.2f})" if ms else "not measured"
        share = row["bitops_per_token"] / numbers["float_bitops_per_token"]
        lines.append(
            f"{name:<14}{row['bitops_per_token'] / 1e9:>14.3f} G{100 * share:>8.1f} %"
            f"{(read['weights'] + read['cache']) / 1e6:>11.3f} MB{read['cache'] / 1e6:>12.3f} MB{timed:>22}"
        )
    for pair, value in numbers["rank_correlation"].items():
        lines.append(f"rank correlation of {pair}: {value:+.2f}")
    return "\n".join(lines)
