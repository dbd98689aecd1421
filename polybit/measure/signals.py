"""Sensitivities as numbers to rank layers by: tables in nats per token, intervals, Kendall's tau, split halves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polybit.core.records import CostTable, Estimate
from polybit.core.runtime import PolybitError
from polybit.measure.sensitivity import BlockReading
from polybit.measure.table import Loss

Array = NDArray[np.float64]

RESAMPLES, SPLITS, TAIL = 1000, 100, 2.5  # bootstrap draws, random halvings, per cent left out on each side


@dataclass(frozen=True, slots=True)
class Signal:
    """What quantizing each layer alone does to one probe.

    names: L layers · widths: W widths, narrowest first · kl_LWN, nll_LWN: nats over the counted tokens of each
    of N items (nll: rise of the loss on the text itself, may be negative) · tokens_N: counted tokens · sizes_L:
    weights.
    """

    probe: str
    names: tuple[str, ...]
    widths: tuple[int, ...]
    kl_LWN: Array
    nll_LWN: Array
    tokens_N: Array
    sizes_L: tuple[int, ...]

    def per_item(self, loss: Loss = "kl") -> Array:
        """The summed losses [L, W, N]."""
        return self.kl_LWN if loss == "kl" else self.nll_LWN

    def mean(self, loss: Loss = "kl", weights_RN: Array | None = None) -> Array:
        """Nats per token [L, W]; with `weights_RN` (how often each item counts) one such table per row, [R, L, W]."""
        sums_LWN = self.per_item(loss)
        if weights_RN is None:
            return sums_LWN.sum(-1) / self.tokens_N.sum()
        flat_RM = weights_RN @ sums_LWN.reshape(-1, sums_LWN.shape[-1]).T
        per_token = flat_RM / (weights_RN @ self.tokens_N)[:, None]
        return per_token.reshape(len(weights_RN), *sums_LWN.shape[:2])

    def table(self, loss: Loss = "kl") -> CostTable:
        """layer -> bits -> nats per token."""
        mean_LW = self.mean(loss)
        nats = {
            name: dict(zip(self.widths, map(float, row), strict=True))
            for name, row in zip(self.names, mean_LW, strict=True)
        }
        return CostTable(nats, dict(zip(self.names, self.sizes_L, strict=True)))

    def estimates(self, loss: Loss = "kl", *, seed: int = 0) -> dict[str, dict[int, Estimate]]:
        """Each layer and width with its 95 % interval, items resampled (Efron 1979)."""
        drawn_RLW = self.mean(loss, resampled(len(self.tokens_N), seed))
        low_LW, high_LW = np.percentile(drawn_RLW, [TAIL, 100 - TAIL], axis=0)
        value_LW, n = self.mean(loss), len(self.tokens_N)
        return {
            name: {
                width: Estimate(float(value_LW[i, j]), float(low_LW[i, j]), float(high_LW[i, j]), n)
                for j, width in enumerate(self.widths)
            }
            for i, name in enumerate(self.names)
        }


def gather(readings: Iterable[BlockReading], sizes: Mapping[str, int]) -> dict[str, Signal]:
    """Signals of each probe from the readings of all blocks, in the order of the model."""
    ordered = sorted(readings, key=lambda reading: reading.block)
    if not ordered:
        raise PolybitError("no layer was measured: the model has no decoder block with weights to quantize")
    found = {}
    for probe in ordered[0].kl:
        kl: dict[str, dict[int, Array]] = {n: row for r in ordered for n, row in r.kl[probe].items()}
        nll: dict[str, dict[int, Array]] = {n: row for r in ordered for n, row in r.nll[probe].items()}
        widths = tuple(sorted(set.intersection(*(set(row) for row in kl.values()))))
        found[probe] = Signal(
            probe,
            tuple(kl),
            widths,
            np.stack([[row[w] for w in widths] for row in kl.values()]),
            np.stack([[nll[name][w] for w in widths] for name in kl]),
            ordered[0].tokens[probe],
            tuple(sizes[name] for name in kl),
        )
    return found


def resampled(items: int, seed: int, draws: int = RESAMPLES) -> Array:
    """How often each item is drawn in each bootstrap sample, [R, N]."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(items, np.full(items, 1 / items), size=draws).astype(np.float64)


def kendall(a: Sequence[float] | Array, b: Sequence[float] | Array) -> float:
    """Kendall's tau-b of two rankings of the same layers, -1 to 1; ties are corrected for (Kendall 1945)."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2:
        raise PolybitError(f"two rankings of the same 2 or more layers are needed, got {x.shape} and {y.shape}")
    upper = np.triu_indices(len(x), 1)
    over, under = (np.sign(v[:, None] - v[None])[upper] for v in (x, y))
    untied = math.sqrt(float((over != 0).sum()) * float((under != 0).sum()))
    return float((over * under).sum() / untied) if untied else 0.0


def scores(mean_LW: Array, widths: Sequence[int], width: int | None) -> Array:
    """One number per layer to rank by: the harm at one width, or its mean over widths, each relative to that width's.

    A plain mean over widths would be the ranking at the narrowest one, where harms are a hundred times larger.
    """
    if width is not None:
        return mean_LW[..., list(widths).index(width)]
    level = np.abs(mean_LW).mean(axis=-2, keepdims=True)
    return (mean_LW / np.where(level > 0, level, 1)).mean(axis=-1)


def agreement(
    one: Signal, other: Signal, *, width: int | None = None, loss: Loss = "kl", seed: int = 0
) -> dict[str, Any]:
    """Kendall's tau between two signals' rankings of layers, its interval, and how far each agrees with itself.

    Interval: the items of both probes resampled. `reliability`: mean tau between the rankings by two random halves of
    the items. A tau near zero says something about the model only when both signals are reliable.
    """
    if one.names != other.names:
        raise PolybitError("the two sensitivities are of different layers: measure both on the same model")
    rank = [scores(s.mean(loss), s.widths, width) for s in (one, other)]
    drawn = [
        scores(s.mean(loss, resampled(len(s.tokens_N), seed + at)), s.widths, width)
        for at, s in enumerate((one, other))
    ]
    taus = [kendall(a, b) for a, b in zip(*drawn, strict=True)]
    low, high = np.percentile(taus, [TAIL, 100 - TAIL])
    value = kendall(*rank)
    return {
        "tau": {"value": value, "low": min(float(low), value), "high": max(float(high), value), "n": len(one.names)},
        "width": width,
        "loss": loss,
        "reliability": {s.probe: split_half(s, width=width, loss=loss, seed=seed) for s in (one, other)},
    }


def split_half(signal: Signal, *, width: int | None = None, loss: Loss = "kl", seed: int = 0) -> float | None:
    """Mean Kendall's tau between the rankings by random halves of the items; None for a single item."""
    items = len(signal.tokens_N)
    if items < 2:
        return None
    generator = np.random.default_rng(seed)
    first_RN = np.zeros((SPLITS, items))
    for row in first_RN:
        row[generator.permutation(items)[: items // 2]] = 1
    halves = [scores(signal.mean(loss, part), signal.widths, width) for part in (first_RN, 1 - first_RN)]
    return float(np.mean([kendall(a, b) for a, b in zip(*halves, strict=True)]))
