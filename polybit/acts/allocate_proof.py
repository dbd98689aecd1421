"""What an allocation is worth, in numbers: against uniform widths, at other budgets, and how sure its rankings are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polybit.allocate.budget import Choices, bits_of, even, plans_at_budgets
from polybit.evals.scoring import bootstrap
from polybit.measure.plan_score import PlanScore
from polybit.measure.signals import Signal, agreement
from polybit.nn.convert import Target

RANKED = 3  # width at which layers are ranked, where it was measured


def proof(plan: Mapping[str, int], choices: Choices, weights: int, judge: PlanScore, *, seed: int) -> dict[str, Any]:
    """The plan against uniform widths on text nothing was decided on; even bits lie on the line between two of them."""

    plans = {"this plan": plan} | {
        f"uniform w{w}": dict.fromkeys(choices, w) for w in sorted(next(iter(choices.values())))
    }
    read = dict(zip(plans, judge.read(list(plans.values())), strict=True))

    def row(label: str) -> dict[str, Any]:
        readings = read[label]
        kl = {
            probe: bootstrap(r.kl_N / r.tokens_N, seed=seed).to_json() | {"value": r.kl}
            for probe, r in readings.items()
        }
        return {
            "name": label,
            "bits": bits_of(plans[label], choices) / weights,
            "kl": kl,
            "score": judge.score(readings),
        }

    ours, *uniform = map(row, plans)
    line = even(ours["bits"], [(r["bits"], r["score"]) for r in uniform])
    return {
        "rows": [ours, *uniform],
        "score": ours["score"],
        "uniform_score": line,
        "better_than_uniform": ours["score"] <= line * (1 + 1e-9),
    }


def front(
    choices: Choices, groups: Sequence[Sequence[str]], weights: int, judge: PlanScore, count: int
) -> list[dict[str, Any]]:
    """Solved plans at `count` budgets, measured on the text of the proof."""
    found = []
    plans = list(plans_at_budgets(choices, groups, count))
    for plan, readings in zip(plans, judge.read(plans), strict=True):
        kl = {probe: r.kl for probe, r in readings.items()}
        found.append({"bits": bits_of(plan, choices) / weights, "score": judge.score(readings), "kl": kl})
    return found


def layer_rows(
    chosen: Sequence[Target],
    plan: Mapping[str, int],
    groups: Sequence[Sequence[str]],
    signals: Mapping[str, Signal],
) -> dict[str, Any]:
    """Per layer: shape, width, group, and its sensitivities with intervals."""
    owner = {name: number for number, group in enumerate(groups) for name in group}
    tables = {probe: {loss: signal.estimates(loss) for loss in ("kl", "nll")} for probe, signal in signals.items()}
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
    signals: Mapping[str, Signal], general: Sequence[str], tasks: Sequence[str], *, seed: int
) -> dict[str, Any]:
    """How alike general text and each task rank the layers, by KL and by the loss itself."""
    result = {}
    for one, other in ((signals[g], signals[t]) for g in general for t in tasks):
        if len(one.names) < 2:
            continue
        width = RANKED if RANKED in one.widths else one.widths[0]
        for loss in ("kl", "nll"):
            label = f"of {one.probe} and {other.probe} by {loss} at {width} bits"
            result[label] = agreement(one, other, width=width, loss=loss, seed=seed)
    return result
