"""What a calibration mixture is really worth: quantize at each, measure every domain, judge the forward-only proxy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from polybit.compress.blocks import Whole
from polybit.compress.mix_files import draw
from polybit.core.runtime import PolybitError, track
from polybit.measure.seeds import over_seeds
from polybit.nn.convert import Target

Quantize = Callable[[Tensor, int], Mapping[str, Tensor]]  # (windows [N, T], seed) -> weights [O, I] by layer
Share = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[tuple[int, Any]]]  # (work, tasks) -> (number, result)


@dataclass(frozen=True, slots=True)
class Harm:
    """Of a quantized model against the float model on one domain's held-out text, nats per token: KL(float ||
    quantized) and the rise of the negative log-likelihood."""

    kl: float
    nll: float


@torch.no_grad()
def harm(whole: Whole, weights: Mapping[str, Tensor], windows_NT: Tensor, *, batch: int = 8) -> Harm:
    """Harm on some windows; the float model is run beside, so that nothing but one batch is kept."""
    kl = nll = 0.0
    for ids_BT in windows_NT.split(batch):
        wanted_BTV = log_softmax(whole.forward({}, ids_BT)[:, :-1].float(), -1)
        given_BTV = log_softmax(whole.forward(weights, ids_BT)[:, :-1].float(), -1)
        kl += float((wanted_BTV.exp() * (wanted_BTV - given_BTV)).sum())
        index_BT1 = ids_BT[:, 1:, None].to(given_BTV.device)
        nll += float((wanted_BTV - given_BTV).gather(-1, index_BT1).sum())
    count = windows_NT.shape[0] * (windows_NT.shape[1] - 1)
    return Harm(kl / count, nll / count)


def measure_mixtures(
    model: nn.Module,
    targets: Sequence[Target],
    windows: Mapping[str, Tensor],
    held_out: Mapping[str, Tensor],
    points: Sequence[tuple[float, ...]],
    quantize: Quantize,
    *,
    samples: int,
    seeds: Sequence[int],
    keep: Callable[[str, Any], None] | None = None,
    kept: Mapping[str, Any] | None = None,
    share: Share | None = None,
) -> dict[tuple[float, ...], dict[str, list[Harm]]]:
    """Quantize at every point with every seed and measure every domain: point -> domain -> one Harm per seed.

    windows, held_out: source -> [N, T] to calibrate on and to measure on, without a token in common. A seed decides
    which windows are drawn. kept, keep: finished measurements of an interrupted run, and where to note a new one ·
    share: (work, tasks) -> (number, result) of each, by workers (default: here, one after another).
    """
    meter = MixtureMeter(model, targets, windows, held_out, quantize, samples)
    records = dict(kept or {})
    todo = [(point, seed) for seed in seeds for point in points]
    missing = [task for task in todo if mixture_key(*task) not in records]
    results = ((n, meter(task)) for n, task in enumerate(missing)) if share is None else share(meter, missing)
    for number, record in track(results, "mixtures", len(todo), done=len(todo) - len(missing)):
        key = mixture_key(*missing[number])
        records[key] = record
        if keep is not None:
            keep(key, record)
    return {
        point: {name: [Harm(*records[mixture_key(point, seed)][name]) for seed in seeds] for name in held_out}
        for point in points
    }


def mixture_key(point: tuple[float, ...], seed: int) -> str:
    """A measurement as it is noted."""
    return f"seed {seed} mixture {','.join(f'{w:.4f}' for w in point)}"


class MixtureMeter:
    """Measures one mixture with one seed: quantizes at it and reads every domain; domain -> [kl, nll]."""

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        windows: Mapping[str, Tensor],
        held_out: Mapping[str, Tensor],
        quantize: Quantize,
        samples: int,
    ) -> None:
        self.whole = Whole(model, tuple(targets))
        self.windows, self.held_out, self.quantize, self.samples = windows, held_out, quantize, samples

    def __call__(self, task: tuple[tuple[float, ...], int]) -> dict[str, list[float]]:
        """(shares of the sources, seed)."""
        point, seed = task
        drawn_NT = draw(self.windows, dict(zip(self.windows, point, strict=True)), self.samples, seed=seed)
        weights = self.quantize(drawn_NT, seed)
        harms = {name: harm(self.whole, weights, part) for name, part in self.held_out.items()}
        return {name: [h.kl, h.nll] for name, h in harms.items()}


def worst(domains: Mapping[str, list[Harm]]) -> list[float]:
    """KL of the domain that suffers most, one value per seed."""
    return [max(harms[seed].kl for harms in domains.values()) for seed in range(len(next(iter(domains.values()))))]


def worst_share(domains: Mapping[str, list[Harm]], least: Mapping[str, float]) -> list[float]:
    """Of the domain that loses most against its own best mixture, KL over KL there, less 1; one value per seed.

    A model strange to the task has a high KL there whatever the calibration; this asks which mixture is fair to both.
    """
    seeds = range(len(next(iter(domains.values()))))
    return [max(harms[seed].kl / least[name] for name, harms in domains.items()) - 1 for seed in seeds]


def judge(
    sources: Sequence[str],
    found: Mapping[tuple[float, ...], dict[str, list[Harm]]],
    picks: Mapping[str, tuple[float, ...]],
) -> dict[str, Any]:
    """The measured table, and under two measures the true best point (mean over seeds) and the regret of each pick.

    Measures: `worst_kl`, the worst domain's KL in nats per token, and `worst_share` (see there). Each has `best`,
    `spread` (worst point less best point), `noise` (standard deviation over seeds at the best point: a regret below it
    means nothing) and `regret` (the pick less the best point, paired by seed).
    """
    unknown = [name for name, point in picks.items() if point not in found]
    if unknown:
        raise PolybitError(f"the pick of {unknown[0]!r} was not measured: measure its mixture too")
    domains = list(next(iter(found.values())))
    least = {d: min(over_seeds([h.kl for h in rows[d]]).value for rows in found.values()) for d in domains}
    measures = {
        "worst_kl": {point: worst(rows) for point, rows in found.items()},
        "worst_share": {point: worst_share(rows, least) for point, rows in found.items()},
    }
    table = []
    for point, rows in found.items():
        row: dict[str, Any] = {"weights": dict(zip(sources, point, strict=True))}
        row["kl"] = {name: over_seeds([h.kl for h in harms]).to_json() for name, harms in rows.items()}
        row["nll"] = {name: over_seeds([h.nll for h in harms]).to_json() for name, harms in rows.items()}
        row |= {name: over_seeds(values[point]).to_json() for name, values in measures.items()}
        row["per_seed"] = {name: [[h.kl, h.nll] for h in harms] for name, harms in rows.items()}
        table.append(row)
    verdicts = {name: verdict(sources, values, picks) for name, values in measures.items()}
    return {"points": table, **verdicts}


def verdict(
    sources: Sequence[str], values: Mapping[tuple[float, ...], list[float]], picks: Mapping[str, tuple[float, ...]]
) -> dict[str, Any]:
    """Best point of one measure, its noise, the spread over points, and the regret of every pick."""
    means = {point: over_seeds(per_seed).value for point, per_seed in values.items()}
    best = min(means, key=means.__getitem__)
    noise = stdev(values[best]) if len(values[best]) > 1 else 0.0
    regret = {
        name: {
            "weights": dict(zip(sources, point, strict=True)),
            **over_seeds(values[point], paired_with=values[best]).to_json(),
        }
        for name, point in picks.items()
    }
    spread = max(means.values()) - means[best]
    return {"best": dict(zip(sources, best, strict=True)), "noise": noise, "spread": spread, "regret": regret}
