"""Which mixture of texts to calibrate on: one forward pass per text, then any mixture is scored for free.

The trace vector of a text D has one entry per distinct layer input, h_l(D) = mean ‖x‖² per token = tr(H_l): energy is a
mean over tokens, so the vector of a mixture is the mixture of the vectors. Suffixes: S sources, L layer inputs,
P points (mixtures), I input columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from polybit.compress.blocks import VisitedBlock, find_blocks, run_blocks
from polybit.compress.source import IN_MEMORY, WeightSource
from polybit.compress.states import Room
from polybit.compress.stats import watch
from polybit.core.parts import pick
from polybit.core.runtime import PolybitError, track
from polybit.measure.table import CRITERIA
from polybit.nn.convert import Target

Normalise = Literal["size", "layer"]
STEPS = {2: 0.05, 3: 0.1, 4: 0.1}  # distance of neighbouring shares on the grid, by number of sources; 0.2 beyond
ERANK_COLUMNS = 1024  # larger Hessians are judged by this many evenly spaced columns


@dataclass(frozen=True, slots=True)
class Traces:
    """What each source excites in the float model.

    energy_SL: mean ‖x‖² per token at every distinct layer input · columns_L: its number of columns ·
    erank_PL: effective rank of the Hessian of every point asked for, None when none was · tokens: per source.
    """

    sources: tuple[str, ...]
    layers: tuple[str, ...]
    energy_SL: Tensor
    columns_L: Tensor
    tokens: tuple[int, ...]
    erank_PL: Tensor | None = None

    def vectors(self, normalise: Normalise) -> Tensor:
        """Trace vectors [S, L] made comparable across layers, float64.

        "size": energy per column, as the layers' Hessians weigh it. "layer": also divided by the layer's mean over the
        sources, so that a few layers with massive activations do not decide the angle alone.
        """
        vectors_SL = self.energy_SL.double() / self.columns_L
        return vectors_SL if normalise == "size" else vectors_SL / vectors_SL.mean(0).clamp_min(1e-300)


@dataclass(frozen=True, slots=True)
class MixturePoint:
    """One mixture and what speaks for it: share of tokens per source, score, its alignment and erank ratio."""

    weights: tuple[float, ...]
    score: float
    alignment: float
    erank_ratio: float | None


@dataclass(frozen=True, slots=True)
class Mixture:
    """The chosen mixture and the curve it was chosen from; `to_json` is what a report page draws."""

    sources: tuple[str, ...]
    general: tuple[str, ...]
    criterion: str
    normalise: Normalise
    best: MixturePoint
    points: tuple[MixturePoint, ...]
    tokens: tuple[int, ...]

    @property
    def weights(self) -> dict[str, float]:
        """Share of calibration tokens per source."""
        return dict(zip(self.sources, self.best.weights, strict=True))

    def to_json(self) -> dict[str, Any]:
        """{"criterion", "normalise", "general", "tokens", "best": point, "curve": [point]}; a point is {"weights":
        {source: share}, "score", "alignment" (cosine), "erank_ratio" (to the general text, or null)}."""

        def point(p: MixturePoint) -> dict[str, Any]:
            weights = {name: round(w, 6) for name, w in zip(self.sources, p.weights, strict=True)}
            return {"weights": weights, "score": p.score, "alignment": p.alignment, "erank_ratio": p.erank_ratio}

        return {
            "criterion": self.criterion,
            "normalise": self.normalise,
            "sources": list(self.sources),
            "general": list(self.general),
            "tokens": dict(zip(self.sources, self.tokens, strict=True)),
            "best": point(self.best),
            "curve": [point(p) for p in self.points],
        }


def best_mixture(
    model,
    sources: Mapping[str, Sequence[Tensor]],
    targets: Sequence[Target],
    *,
    general: Sequence[str],
    criterion: str = "family",
    normalise: Normalise = "size",
    family: Mapping[str, Sequence[Tensor]] | None = None,
    step: float | None = None,
) -> Mixture:
    """Find the mixture of calibration texts whose activations look most like those of the texts that matter.

    sources: name -> batches of token ids [B, T]; every name not in `general` is a task. One forward pass per source, no
    gradient; memory as for one block. Calibration windows are then drawn by `compress.mix_files.draw`, and `to_json()`
    is kept for the report. The criteria of CRITERIA (after TASA,
    arXiv 2607.00908, which chooses argmax cos(h(D_α), h(D_target))):

    literal: the target is the calibration task pool itself. h is linear in α, so pure task text always wins:
    degenerate, kept for comparison.
    family (default): unlike the paper, the target is the mean of the unit trace vectors of all texts that will be
    evaluated (`family`: held-out batches of the same names; default: the sources), so that an optimum between the
    ends exists.
    aligned-diverse: cos to the task pool plus the mean effective rank of the Hessians relative to that of the general
    text, which is the collapse the paper describes. rank-kept: the largest cos to the task pool among the mixtures
    that keep most of that rank.
    Raises PolybitError for fewer than two sources, empty ones, unknown names or no task.
    """
    return search_mixtures(
        model, sources, targets, general=general, criteria=[criterion], normalise=normalise, family=family, step=step
    )[criterion]


def search_mixtures(
    model,
    sources: Mapping[str, Sequence[Tensor]],
    targets: Sequence[Target],
    *,
    general: Sequence[str],
    criteria: Sequence[str],
    normalise: Normalise = "size",
    family: Mapping[str, Sequence[Tensor]] | None = None,
    step: float | None = None,
    source: WeightSource = IN_MEMORY,
    room: Room | None = None,
) -> dict[str, Mixture]:
    """`best_mixture` by several criteria, from the same forward passes; source, room: what lends the weights, and how
    much of the hidden states may be in memory."""
    general = check_sources(sources, general)
    asked = [pick(CRITERIA, criterion, "mixture criterion") for criterion in criteria]
    if normalise not in get_args(Normalise):
        raise PolybitError(
            f"mixture normalisation {normalise!r} is not known: choose {' or '.join(get_args(Normalise))}"
        )
    names = tuple(sources)
    points_PS = simplex(len(names), step)
    ranked = any(criterion.needs_rank for criterion in asked)
    asked_PS = torch.cat([points_PS, pool(names, general)[None]]) if ranked else None
    where: dict[str, Any] = {"source": source, "room": room}
    traces = wanted = collect_traces(model, sources, targets, erank_at=asked_PS, **where)
    if family and any(criterion.target == "family" for criterion in asked):
        wanted = collect_traces(model, family, targets, **where)
    found = {}
    for criterion in criteria:
        points = score_points(traces, points_PS, general, criterion, normalise, wanted)
        best = max(points, key=lambda p: p.score)
        found[criterion] = Mixture(names, general, criterion, normalise, best, tuple(points), traces.tokens)
    return found


def check_sources(sources: Mapping[str, Sequence[Tensor]], general: Sequence[str]) -> tuple[str, ...]:
    """The general sources, in order; refused where there is nothing to mix."""
    unknown = [name for name in general if name not in sources]
    empty = [name for name, batches in sources.items() if not len(batches)]
    if unknown or empty:
        fault = f"{unknown[0]!r} is none of them" if unknown else f"{empty[0]!r} holds no text"
        raise PolybitError(f"a mixture of {', '.join(map(repr, sources))} cannot be searched: {fault}")
    if not general or len(set(general)) == len(sources):
        raise PolybitError(
            f"a mixture needs general text and at least one task, got {len(set(general))} general of {len(sources)} "
            "texts: give --general FILE and --tasks FILE"
        )
    return tuple(name for name in sources if name in general)


def simplex(count: int, step: float | None = None) -> Tensor:
    """Every mixture of `count` sources whose shares are multiples of `step`, float64 [P, S]; ends included."""
    step = STEPS.get(count, 0.2) if step is None else step
    parts = round(1 / step) if step > 0 else 0
    if parts < 1 or abs(parts * step - 1) > 1e-6:
        raise PolybitError(f"mixture step {step!r} does not divide 1: give for example 0.25, 0.1 or 0.05")

    def compositions(total: int, places: int) -> list[tuple[int, ...]]:
        if places == 1:
            return [(total,)]
        return [(first, *rest) for first in range(total + 1) for rest in compositions(total - first, places - 1)]

    return torch.tensor(compositions(parts, count), dtype=torch.float64) / parts


def pool(names: Sequence[str], chosen: Sequence[str]) -> Tensor:
    """Equal shares of the chosen sources, [S]."""
    shares_S = torch.tensor([float(name in chosen) for name in names], dtype=torch.float64)
    return shares_S / shares_S.sum()


@torch.no_grad()
def collect_traces(
    model,
    sources: Mapping[str, Sequence[Tensor]],
    targets: Sequence[Target],
    *,
    erank_at: Tensor | None = None,
    source: WeightSource = IN_MEMORY,
    room: Room | None = None,
) -> Traces:
    """Walk all sources through the float model together, block by block, one forward pass each.

    erank_at: mixtures [P, S] whose Hessians' effective ranks are wanted; the Hessians of one block at a time are kept.
    """
    names = tuple(sources)
    walks = [
        run_blocks(model, list(sources[name]), targets, references=False, source=source, room=room) for name in names
    ]
    energies, columns, layers, eranks = [], [], [], []
    tokens = [sum(ids_BT.numel() for ids_BT in sources[name]) for name in names]
    _, modules = find_blocks(model, targets)
    for blocks in track(zip(*walks, strict=True), "traces", total=len(modules)):
        heads = tuple(stage[0] for stage in blocks[0].stages())  # q, k and v read the same input: it counts once
        seen = [watch_through(block, heads) for block in blocks]
        for target in heads:
            hessians = [stats[target.name] for stats in seen]
            energies.append(torch.stack([hessian_II.diagonal().double().sum() for hessian_II in hessians]).cpu())
            columns.append(target.columns)
            layers.append(target.name)
            if erank_at is not None:
                eranks.append(torch.stack([effective_rank(blend(hessians, shares_S)) for shares_S in erank_at]).cpu())
    return Traces(
        names,
        tuple(layers),
        torch.stack(energies, 1),
        torch.tensor(columns, dtype=torch.float64),
        tuple(tokens),
        torch.stack(eranks, 1) if eranks else None,
    )


def watch_through(block: VisitedBlock, heads: Sequence[Target]) -> dict[str, Tensor]:
    """Send a source's batches through one float block and give the Hessians [I, I] of the chosen inputs."""
    with ExitStack() as stack:
        grams = stack.enter_context(watch(block.model, heads))
        block.finish()
    return {name: gram.stats().hessian_II for name, gram in grams.items()}


def blend(hessians: Sequence[Tensor], shares_S: Tensor) -> Tensor:
    """Hessian of a mixture, [I, I]; at most ERANK_COLUMNS evenly spaced columns of it."""
    every = -(-len(hessians[0]) // ERANK_COLUMNS)
    parts = [
        float(share) * hessian_II[::every, ::every].double()
        for share, hessian_II in zip(shares_S, hessians, strict=True)
    ]
    return torch.stack(parts).sum(0)


def effective_rank(hessian_II: Tensor) -> Tensor:
    """exp of the entropy of the normalised eigenvalues: 1 when all tokens lie on a line, I when none is preferred."""
    values_I = torch.linalg.eigvalsh(hessian_II).clamp_min(0)
    shares_I = values_I / values_I.sum().clamp_min(1e-300)
    return torch.exp(-(torch.xlogy(shares_I, shares_I)).sum())


def score_points(
    traces: Traces,
    points_PS: Tensor,
    general: Sequence[str],
    criterion: str,
    normalise: Normalise = "size",
    wanted: Traces | None = None,
) -> list[MixturePoint]:
    """Score mixtures; `traces.erank_PL` belongs to these points, with the general pool as one more at the end.

    wanted: traces of the texts that will be evaluated, the target "family" (default: the sources' own).
    """
    vectors_SL = traces.vectors(normalise)
    part = pick(CRITERIA, criterion, "mixture criterion")
    if part.target == "family":
        target_L = torch.nn.functional.normalize((wanted or traces).vectors(normalise), dim=1).mean(0)
    else:
        target_L = pool(traces.sources, [name for name in traces.sources if name not in general]) @ vectors_SL
    alignment_P = torch.cosine_similarity(points_PS @ vectors_SL, target_L[None], dim=1, eps=1e-300)
    ratio_P = None if traces.erank_PL is None else (traces.erank_PL[:-1] / traces.erank_PL[-1]).mean(1)
    score_P = part(alignment_P, ratio_P)
    return [
        MixturePoint(
            tuple(shares_S.tolist()),
            float(score_P[index]),
            float(alignment_P[index]),
            None if ratio_P is None else float(ratio_P[index]),
        )
        for index, shares_S in enumerate(points_PS)
    ]
