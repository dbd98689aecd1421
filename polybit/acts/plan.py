"""Say what quantizing a model would give and cost, from its configuration alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from polybit.compress.blocks import find_blocks
from polybit.compress.ends import end_bits, end_targets
from polybit.compress.forecast import Stopwatch, expected_memory, expected_sizes, foretell_seconds
from polybit.compress.recipe import STATE_BYTES, choose, within_memory
from polybit.compress.text import window_length
from polybit.core.precision import FLOAT
from polybit.core.records import Run
from polybit.hub.drawn import drawn_model
from polybit.hub.families import FAMILIES
from polybit.hub.models import resolve
from polybit.hub.skeleton import load_skeleton
from polybit.nn.convert import Target, ends, left_in_float, targets
from polybit.options.checks import plain
from polybit.options.plan import PlanOptions
from polybit.speed.machine import PLAIN_BLOCK_SECONDS, recall


def plan(model: str, options: PlanOptions) -> Run:
    """Say what quantizing MODEL would give and cost. Reads its configuration only, no weights."""
    recipe = choose(
        options.chosen_method(),
        options.stored_widths(),
        options.group_size,
        asymmetric=options.asymmetric,
        effort=options.effort,
    )
    run = Run("plan", {"model": model, **plain(options)})
    with run.timed():
        with (start := Stopwatch()):  # libraries are loaded here, as in a run
            skeleton: Any = load_skeleton(resolve(model), trust_remote_code=options.trust_remote_code)
        chosen = targets(skeleton, include_embeddings=options.include_embeddings)
        bits_of_ends = FLOAT if options.include_embeddings else end_bits(skeleton, options.ends)
        ends_held = end_targets(skeleton) if bits_of_ends != FLOAT else []
        recipe = within_memory(recipe, sum(target.size for target in chosen))
        parameters = sum(p.numel() for p in skeleton.parameters())
        sizes = expected_sizes(chosen, recipe)
        run.numbers = {
            "recipe": recipe.to_json(),
            "parameters": parameters,
            "quantized": sum(t.size for t in chosen),
            "layers": len(chosen),
            "ends": {"bits": bits_of_ends, "weights": sum(t.size for t in ends_held)},
            "left_in_float": [asdict(row) for row in left_in_float(skeleton, [*chosen, *ends_held])],
            "sizes": sizes,
            "memory": expected_memory(
                parameters,
                [*chosen, *ends_held],
                tokens=options.samples * window_length(skeleton, options.window),
                hidden=int(getattr(skeleton.config.get_text_config(), "hidden_size", 0) or 0),
                blocks=len(find_blocks(skeleton, chosen)[1]) if chosen else 1,
            ),
            "disk": expected_disk(sizes, parameters, [*chosen, *ends_held], bits_of_ends)
            + (
                2 * STATE_BYTES * len(recipe.learned_widths) * sum(t.size for t in chosen) if recipe.finish_steps else 0
            ),
            "speed": expected_speed(skeleton, sizes, bits_of_ends, options),
        }
        if options.dry_run and chosen:
            length = window_length(skeleton, options.window)
            source = drawn_model(model, skeleton)
            run.numbers["time"] = foretell_seconds(
                source, chosen, ends_held, recipe, windows=options.samples, length=length, start=start.seconds
            )
    return run


def expected_disk(
    sizes: Mapping[str, Mapping[str, float]], parameters: int, held: Sequence[Target], bits_of_ends: int
) -> int:
    """Bytes of disk while quantizing: finished blocks and the checkpoint made of them lie side by side at the end."""
    stored = max((row["bytes"] for row in sizes.values()), default=0.0)
    at_ends = sum(t.size for t in held if t.kind in ("embedding", "head")) * bits_of_ends / 8
    return int(2 * (stored + at_ends) + 4 * (parameters - sum(t.size for t in held)))


def expected_speed(
    skeleton: Any, sizes: Mapping[str, Mapping[str, float]], bits_of_ends: int, options: PlanOptions
) -> dict[str, Any] | None:
    """Tokens per second of one sequence at each width, from the constants `polybit bench` kept; None without them."""
    constants = recall(options.threads or torch.get_num_threads())
    if constants is None:
        return None
    _, head = ends(skeleton)
    vocabulary = sum(p.numel() for p in head.parameters()) if head is not None else 0
    overhead = 1 + 16 / (8 * options.group_size if options.group_size else 1 << 20)
    head_bytes = vocabulary * 4.0 if bits_of_ends == FLOAT else vocabulary * bits_of_ends / 8 * overhead
    if options.include_embeddings:
        head_bytes = 0.0  # counted with the blocks
    config = skeleton.config
    blocks = int(getattr(config.get_text_config(), "num_hidden_layers", 0) or 0)
    calls = len(targets(skeleton)) * 4 / 7 + 1  # products that share an input are one call
    between = None if config.model_type in FAMILIES else PLAIN_BLOCK_SECONDS
    found = {}
    for name, row in sizes.items():
        in_float = bits_of_ends == FLOAT
        quantized, floats = (row["bytes"], head_bytes) if in_float else (row["bytes"] + head_bytes, 0.0)
        found[name] = 1 / constants.seconds_per_token(
            int(name[1:]), quantized=quantized, floats=floats, calls=round(calls), blocks=blocks, block_seconds=between
        )
    return {"tokens_per_second": found, "threads": constants.threads, "measured": constants.measured}
