"""`polybit plan`: sizes, memory, time and what stays in float, before anything is run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from polybit.commands.quantize import Method, QuantizeConfig, recipe_of
from polybit.hub.models import resolve

STATISTICS_COPIES = 4  # Hessian, its damped copy, its factor, and one working copy live at the same time


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Flags of `polybit plan`; they mean what they mean for `polybit quantize`."""

    widths: str | None = None
    """Widths one nested checkpoint would serve (default: 8,6,5,4,3,2 unless --bits is given)."""
    bits: int | None = None
    """One width only."""
    method: Method | None = None
    """How weights would become codes (default: nested for --widths, rounding for --bits)."""
    group_size: int = 64
    """Weights that share a scale: 16, 32, 64, 128, 256, or 0 = a whole row."""
    asymmetric: bool | None = None
    """Store a zero point per group."""
    samples: int = 128
    """Windows of calibration text."""
    window: int | None = None
    """Tokens per window."""
    include_embeddings: bool = False
    """Quantize the token embedding and the output head as all other layers, at every width."""
    ends: int | None = None
    """Bits of the token embedding and the output head whatever the width, 16 = float (default: 8 for a large head)."""
    threads: int | None = None
    """Threads the speed is predicted for (default: those torch takes)."""
    dry_run: bool = True
    """Quantize one random matrix of the model's commonest shape here, to tell the time the whole will take."""
    json: Path | None = None
    """Write the numbers there."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""


def plan(model: str, /, *, config: Annotated[PlanConfig, Parameter(name="*")] = PlanConfig()) -> None:
    """Say what quantizing MODEL would give and cost. Reads its configuration only, never its weights."""
    asked = {key: getattr(config, key) for key in ("widths", "bits", "method", "group_size", "asymmetric")}
    recipe = recipe_of(QuantizeConfig(out=Path("unused"), **asked))
    from polybit.compress.ends import end_bits, end_targets
    from polybit.compress.text import window_length
    from polybit.core.precision import FLOAT
    from polybit.core.records import Run
    from polybit.hub.skeleton import load_skeleton
    from polybit.nn.convert import left_in_float, targets

    run = Run("plan", {"model": model, **{k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}})
    with run.timed():
        skeleton = load_skeleton(resolve(model), trust_remote_code=config.trust_remote_code)
        chosen = targets(skeleton, include_embeddings=config.include_embeddings)
        bits_of_ends = FLOAT if config.include_embeddings else end_bits(skeleton, config.ends)
        ends = end_targets(skeleton) if bits_of_ends != FLOAT else []
        tokens = config.samples * window_length(skeleton, config.window)
        numbers: dict[str, Any] = {
            "parameters": sum(p.numel() for p in skeleton.parameters()),
            "quantized": sum(t.size for t in chosen),
            "layers": len(chosen),
            "ends": {"bits": bits_of_ends, "weights": sum(t.size for t in ends)},
            "left_in_float": [asdict(row) for row in left_in_float(skeleton, [*chosen, *ends])],
            "sizes": sizes(chosen, recipe),
            "memory": memory(skeleton, [*chosen, *ends], tokens),
        }
        numbers["speed"] = speed(skeleton, numbers["sizes"], ends, bits_of_ends, config)
        if config.dry_run and chosen:
            numbers["dry_run"] = dry_run(chosen, recipe)
    run.numbers = numbers
    print_plan(model, recipe, numbers)
    if config.json is not None:
        run.write(config.json)


def sizes(chosen: Sequence[Any], recipe) -> dict[str, dict[str, float]]:
    """Effective bits per weight and bytes read at each width, all quantized layers together."""
    grid = recipe.grid
    weights = max(sum(t.size for t in chosen), 1)
    zero_bits = grid.bits if grid.zero == "group" else 0
    found = {}
    for width in recipe.widths:
        bits = read = 0.0
        for t in chosen:
            groups, rows, columns = grid.groups(t.columns), -(-t.rows // 16) * 16, -(-t.columns // 32) * 32
            per_row = (16 + zero_bits) * groups
            bits += t.rows * (width * t.columns + per_row)
            read += rows * (width * columns + (16 + (8 if zero_bits else 0)) * groups) / 8
        found[f"w{width}"] = {"bits_per_weight": bits / weights, "bytes": read}
    return found


def memory(skeleton, chosen: Sequence[Any], tokens: int) -> dict[str, int]:
    """Bytes: the float model as loaded (float32), what quantizing adds at most, and the quantized model at rest."""
    parameters = sum(p.numel() for p in skeleton.parameters())
    widest = max((t.columns for t in chosen), default=0)
    hidden = int(getattr(skeleton.config.get_text_config(), "hidden_size", 0) or 0)
    return {
        "float_model": 4 * parameters,
        "quantizing_adds": STATISTICS_COPIES * 4 * widest**2 + 3 * 4 * tokens * hidden,
        "float_part_at_rest": 4 * (parameters - sum(t.size for t in chosen)),
    }


def speed(
    skeleton, widths: Mapping[str, Mapping[str, float]], ends: Sequence[Any], bits: int, config: PlanConfig
) -> dict[str, Any] | None:
    """Tokens per second of one sequence at each width, from the constants `polybit bench` kept; None without them."""
    import torch

    from polybit.core.precision import FLOAT
    from polybit.hub.decode import FAMILIES
    from polybit.nn.convert import ends as ends_of
    from polybit.nn.convert import targets
    from polybit.speed.machine import PLAIN_BLOCK_SECONDS, recall

    constants = recall(config.threads or torch.get_num_threads())
    if constants is None:
        return None
    _, head = ends_of(skeleton)
    vocabulary = sum(p.numel() for p in head.parameters()) if head is not None else 0
    overhead = 1 + 16 / (8 * config.group_size if config.group_size else 1 << 20)
    head_bytes = vocabulary * 4.0 if bits == FLOAT else vocabulary * bits / 8 * overhead
    if config.include_embeddings:
        head_bytes = 0.0  # counted with the blocks
    blocks = int(getattr(skeleton.config.get_text_config(), "num_hidden_layers", 0) or 0)
    calls = len(targets(skeleton)) * 4 / 7 + 1  # products that share an input are one call
    between = None if skeleton.config.model_type in FAMILIES else PLAIN_BLOCK_SECONDS
    found = {}
    for name, row in widths.items():
        quantized, floats = (row["bytes"], head_bytes) if bits == FLOAT else (row["bytes"] + head_bytes, 0.0)
        width = int(name[1:])
        found[name] = 1 / constants.seconds_per_token(
            width, quantized=quantized, floats=floats, calls=round(calls), blocks=blocks, block_seconds=between
        )
    return {"tokens_per_second": found, "threads": constants.threads, "measured": constants.measured}


def dry_run(chosen: Sequence[Any], recipe) -> dict[str, Any]:
    """Quantize one random layer of the commonest shape and scale its time to all layers.

    Time grows with rows * columns^2 for methods that compensate errors; learned rounding is not in it.
    """
    import torch

    from polybit.compress.loop import quantize_layer
    from polybit.core.records import LayerStats

    shapes = [(t.rows // t.experts, t.columns) for t in chosen]
    rows, columns = max(set(shapes), key=shapes.count)
    rows, columns = min(rows, 2048), min(columns, 2048)  # a larger layer would make the preview long
    draw = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(rows, columns, generator=draw) / columns**0.5
    x_TI = torch.randn(2 * columns, columns, generator=draw)
    stats = LayerStats(x_TI.T @ x_TI / len(x_TI), x_TI.abs().mean(0), len(x_TI))
    started = time.perf_counter()
    quantize_layer(weight_OI, stats, recipe)
    seconds = time.perf_counter() - started
    work = sum(t.size * t.columns for t in chosen)
    return {
        "shape": [rows, columns],
        "seconds": seconds,
        "all_layers_seconds": seconds * work / (rows * columns**2),
        "learned_rounding": bool(recipe.block_steps or recipe.finish_steps),
    }


def print_plan(model: str, recipe, numbers: Mapping[str, Any]) -> None:
    """The plan as a table and a few sentences."""
    from polybit.report.tables import aligned, percent, size

    total, quantized = numbers["parameters"], numbers["quantized"]
    half = 2 * quantized
    print(
        f"{model}: {total:,} parameters; {numbers['layers']} layers with {percent(quantized / max(total, 1))} of them"
    )
    print(f"method {recipe.method}, group size {recipe.grid.group_size or 'row'}, zero point: {recipe.grid.zero}\n")
    rows = [
        [name, f"{row['bits_per_weight']:.3f}", size(row["bytes"]), f"{100 * row['bytes'] / max(half, 1):.0f} %"]
        for name, row in numbers["sizes"].items()
    ]
    print(aligned(["width", "bits/weight", "bytes read", "of 16-bit"], rows))
    ends = numbers["ends"]
    if ends["weights"]:
        print(f"\nembedding and output head: {ends['weights']:,} weights, {ends['bits']} bits at every width")
    print_speed(numbers["speed"])
    print("\nstays in float:")
    for row in numbers["left_in_float"]:
        print(f"  {percent(row['share']):>7}  {row['name']} ({row['reason']})")
    need = numbers["memory"]
    print(
        f"\nmemory to quantize: {size(need['float_model'])} for the float model, {size(need['quantizing_adds'])} more; "
        f"to run: {size(need['float_part_at_rest'])} in float + the bytes stored"
    )
    if "dry_run" in numbers:
        preview = numbers["dry_run"]
        more = ", learned rounding comes on top" if preview["learned_rounding"] else ""
        print(
            f"time: one {preview['shape'][0]}x{preview['shape'][1]} layer took {preview['seconds']:.2f} s here, "
            f"all layers about {preview['all_layers_seconds']:.0f} s{more}"
        )


def print_speed(found: Mapping[str, Any] | None) -> None:
    """Predicted tokens per second, or how to get them."""
    if found is None:
        print(
            "\nspeed: not measured on this machine yet; `polybit bench linear` measures it once, then it is told here"
        )
        return
    from polybit.report.tables import number

    each = ", ".join(f"{name} {number(value)}" for name, value in found["tokens_per_second"].items())
    print(
        f"\nexpected tokens per second, one sequence, {found['threads']} threads: {each} "
        f"(from what `polybit bench linear` measured here on {found['measured']})"
    )
