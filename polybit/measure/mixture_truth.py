"""What a calibration mixture is really worth: quantize at each, measure every domain, judge the forward-only proxy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

import torch
from torch import Tensor, nn

from polybit.compress.mix_files import draw
from polybit.compress.source import IN_MEMORY, WeightSource
from polybit.compress.states import Room
from polybit.core.affine import QWeight
from polybit.core.runtime import PolybitError, track
from polybit.measure.passage import States, WholePassage
from polybit.measure.seeds import over_seeds
from polybit.nn.convert import Target

Quantize = Callable[[Tensor, int], Iterable[Mapping[str, QWeight]]]  # (windows [N, T], seed) -> codes, block by block
Share = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[tuple[int, Any]]]  # (work, tasks) -> (number, result)
BATCH = 8  # windows that are read at once


@dataclass(frozen=True, slots=True)
class Harm:
    """Of a quantized model against the float model on one domain's held-out text, nats per token: KL(float ||
    quantized) and the rise of the negative log-likelihood."""

    kl: float
    nll: float


class Harms:
    """Reads the harm of quantized models on some texts, against the float model.

    held_out: text -> windows [N, T] · source, room: what lends the model its weights, and how much of the hidden
    states may be in memory
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[Target],
        held_out: Mapping[str, Tensor],
        *,
        source: WeightSource = IN_MEMORY,
        room: Room | None = None,
    ) -> None:
        self.batches = {name: windows_NT.split(BATCH) for name, windows_NT in held_out.items()}
        every = [ids_BT for batches in self.batches.values() for ids_BT in batches]
        self.passage = WholePassage(model, every, targets, source=source, room=room)
        self.as_float: States | None = None  # made at the first reading: there may be none here, but in workers

    def __call__(self, parts: Iterable[Mapping[str, QWeight]]) -> dict[str, Harm]:
        """Harm by text of codes that come block after block, as `compress` yields them; none is kept."""
        if self.as_float is None:
            self.as_float = self.passage.through()
        codes = iter(parts)
        states = self.passage.through(lambda _: {name: q.dequantize() for name, q in next(codes).items()})
        assert next(codes, None) is None, "there were codes beyond the blocks"
        found, at = {}, 0
        with self.passage.open():
            for name, batches in self.batches.items():
                kl = nll = count = 0.0
                for ids_BT in batches:
                    counted_BT = torch.ones_like(ids_BT, dtype=torch.bool)
                    for span in self.passage.spans(at):
                        wanted_NV = self.passage.log_probabilities(self.as_float, at, counted_BT, span)
                        given_NV = self.passage.log_probabilities(states, at, counted_BT, span)
                        kl += float((wanted_NV.exp() * (wanted_NV - given_NV)).sum())
                        said_N1 = ids_BT[:, span][:, 1:].reshape(-1, 1).to(given_NV.device)
                        nll += float((wanted_NV - given_NV).gather(1, said_N1).sum())
                        count += len(given_NV)
                    at += 1
                found[name] = Harm(kl / count, nll / count)
        self.passage.let_go(states)
        return found


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
    source: WeightSource = IN_MEMORY,
    room: Room | None = None,
) -> dict[tuple[float, ...], dict[str, list[Harm]]]:
    """Quantize at every point with every seed and measure every domain: point -> domain -> one Harm per seed.

    windows, held_out: source -> [N, T] to calibrate on and to measure on, without a token in common. A seed decides
    which windows are drawn. kept, keep: finished measurements of an interrupted run, and where to note a new one ·
    share: (work, tasks) -> (number, result) of each, by workers (default: here, one after another) · source, room: what
    lends the weights, and how much of the hidden states may be in memory.
    """
    harms = Harms(model, targets, held_out, source=source, room=room)
    meter = MixtureMeter(harms, windows, quantize, samples)
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

    def __init__(self, harms: Harms, windows: Mapping[str, Tensor], quantize: Quantize, samples: int) -> None:
        self.harms, self.windows, self.quantize, self.samples = harms, windows, quantize, samples

    def __call__(self, task: tuple[tuple[float, ...], int]) -> dict[str, list[float]]:
        """(shares of the sources, seed)."""
        point, seed = task
        drawn_NT = draw(self.windows, dict(zip(self.windows, point, strict=True)), self.samples, seed=seed)
        return {name: [h.kl, h.nll] for name, h in self.harms(self.quantize(drawn_NT, seed)).items()}


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
