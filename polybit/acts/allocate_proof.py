"""What an allocation is worth, in numbers: against uniform widths, at other budgets, and how sure its rankings are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polybit.allocate.budget import Choices, bits_of, even, plans_at_budgets
from polybit.evals.scoring import bootstrap
from polybit.measure.plan_loss import PlanReading
from polybit.measure.plan_score import PlanScore
from polybit.measure.signals import Signal, agreement
from polybit.measure.table import Loss
from polybit.nn.convert import Target

RANKED = 3  # width at which layers are ranked, where it was measured


@dataclass(frozen=True, slots=True)
class Proof:
    """What a plan does, measured on text nothing was decided on: beside uniform widths, and with the front of plans."""

    beside: dict[str, Any]
    front: list[dict[str, Any]]


def prove(
    plan: Mapping[str, int],
    choices: Choices,
    solvable: Choices,
    groups: Sequence[Sequence[str]],
    weights: int,
    judge: PlanScore,
    *,
    budgets: int,
    seed: int,
) -> Proof:
    """Measure the plan, uniform widths of all `choices`, and solved plans of `solvable` at so many budgets, at once."""
    widths = sorted(next(iter(choices.values())))
    plans = {"this plan": plan} | {f"uniform w{w}": dict.fromkeys(choices, w) for w in widths}
    front = list(plans_at_budgets(solvable, groups, budgets)) if budgets else []
    measured = [*plans.values(), *front]
    scores, readings = judge(measured), judge.readings(measured)  # read by the first of the two
    bits = [bits_of(each, choices) / weights for each in measured]
    rows: list[dict[str, Any]] = [
        {"name": label, "bits": b, "kl": with_interval(found, seed), "score": score}
        for label, b, found, score in zip(plans, bits, readings, scores, strict=False)
    ]
    ours, *uniform = rows
    line = even(ours["bits"], [(row["bits"], row["score"]) for row in uniform])
    beside = {
        "rows": rows,
        "score": ours["score"],
        "uniform_score": line,  # even bits lie on the line between two uniform widths
        "better_than_uniform": ours["score"] <= line * (1 + 1e-9),
    }
    drawn = [
        {"bits": b, "score": score, "kl": {probe: r.kl for probe, r in found.items()}}
        for b, score, found in list(zip(bits, scores, readings, strict=True))[len(plans) :]
    ]
    return Proof(beside, drawn)


def with_interval(readings: Mapping[str, PlanReading], seed: int) -> dict[str, Any]:
    """KL of each probe in nats per token, with its interval."""
    return {
        probe: bootstrap(r.kl_N / r.tokens_N, seed=seed).to_json() | {"value": r.kl} for probe, r in readings.items()
    }


def layer_rows(
    chosen: Sequence[Target],
    plan: Mapping[str, int],
    groups: Sequence[Sequence[str]],
    signals: Mapping[str, Signal],
    losses: Sequence[Loss],
) -> dict[str, Any]:
    """Per layer: shape, width, group, and its sensitivities with intervals, by the losses that were read."""
    owner = {name: number for number, group in enumerate(groups) for name in group}
    tables = {probe: {loss: signal.estimates(loss) for loss in losses} for probe, signal in signals.items()}
    return {
        t.name: {
            "shape": [t.rows, t.columns],
            "width": plan[t.name],
            "group": owner[t.name],
            "sensitivity": {
                probe: {loss: {str(w): e.to_json() for w, e in rows[t.name].items()} for loss, rows in by_loss.items()}
                for probe, by_loss in tables.items()
            },
        }
        for t in chosen
    }


def agreements(
    signals: Mapping[str, Signal],
    general: Sequence[str],
    tasks: Sequence[str],
    *,
    losses: Sequence[Loss],
    seed: int,
) -> dict[str, Any]:
    """How alike general text and each task rank the layers, by the losses that were read."""
    result = {}
    for one, other in ((signals[g], signals[t]) for g in general for t in tasks):
        if len(one.names) < 2:
            continue
        width = RANKED if RANKED in one.widths else one.widths[0]
        for loss in losses:
            label = f"of {one.probe} and {other.probe} by {loss} at {width} bits"
            result[label] = agreement(one, other, width=width, loss=loss, seed=seed)
    return result
