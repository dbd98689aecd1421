"""One token after a text, precisions taking turns: milliseconds of a step, and bytes of the cache it reads."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from polybit.hub.cache import cache_bytes
from polybit.nn.switch import at, multiply_by


@torch.inference_mode()
def cache_filled(model: Any, context: int) -> float:
    """Bytes a cache of `context` tokens holds at the precision the model has now."""
    out = model(torch.ones(1, context, dtype=torch.int64), use_cache=True)
    return float(cache_bytes(out.past_key_values))


def milliseconds(
    model: Any, presets: Sequence[str], *, context: int, steps: int, rounds: int
) -> dict[str, tuple[float, float, float]]:
    """Median, 10th and 90th percentile of the milliseconds of a token, precisions taking turns."""
    multiply_by(model)  # the compiled kernels, as `polybit generate` uses them
    found: dict[str, list[float]] = {preset: [] for preset in presets}
    token = torch.ones(1, 1, dtype=torch.int64)
    for _ in range(rounds):
        for preset in presets:
            with at(model, preset), torch.inference_mode():
                cache = model(torch.ones(1, context, dtype=torch.int64), use_cache=True).past_key_values
                for _ in range(steps):
                    started = time.perf_counter()
                    model(token, past_key_values=cache, use_cache=True)
                    found[preset].append(1000 * (time.perf_counter() - started))
    return {preset: spread(values) for preset, values in found.items()}


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 10th and 90th percentile."""
    tenths = statistics.quantiles(values, n=10) if len(values) > 1 else [values[0]] * 9
    return statistics.median(values), tenths[0], tenths[-1]
