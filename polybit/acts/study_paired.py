"""Models measured on the same prompts, texts and questions, compared pair by pair with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from polybit.core.records import Estimate
from polybit.evals.fidelity import Closeness, fidelity_numbers, prefix_share, rouge_l
from polybit.evals.scoring import bootstrap, exponentiate, ratio_interval

Measured = Mapping[str, Any]
MOST = 1000.0  # times nothing, or nearly nothing: more is not told apart


def compared(measured: Mapping[str, Measured], pairs: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """{"rows": label -> numbers against the float model, "against": name -> one model against another}.

    pairs: name -> the labels of both, as in what was aligned and what it began from.
    """
    floats = measured["float"]
    rows = {label: numbers(one, floats) for label, one in measured.items()}
    against = {name: differences(measured[one], measured[other], floats) for name, (one, other) in pairs.items()}
    return {"rows": rows, "against": against}


def numbers(one: Measured, floats: Measured) -> dict[str, Any]:
    """One row: what its answers and its scores are beside the float model's."""
    found: dict[str, Any] = {"bits": one["bits"]}
    for name in ("flips", "kl", "margin"):
        found[name] = ratio(one[name], one["tokens"])
    narrower = np.asarray(one["margin"]) / np.asarray(one["tokens"])
    found["margin_difference"] = bootstrap(
        narrower, paired_with=np.asarray(floats["margin"]) / np.asarray(floats["tokens"])
    ).to_json()
    found["shared"] = bootstrap(one["shared"]).to_json()
    found["same"] = bootstrap(np.asarray(one["same"], dtype=bool)).to_json()
    found["perplexity"] = exponentiate(bootstrap(one["nll"])).to_json()
    found["nll_difference"] = bootstrap(one["nll"], paired_with=floats["nll"]).to_json()
    found["tasks"] = {name: task(right, floats["tasks"][name]) for name, right in one["tasks"].items()}
    pooled, base = pool(one), pool(floats)
    if pooled.size:
        found["task_mean"] = task(pooled, base)
    return found


def pool(one: Measured) -> np.ndarray:
    """All questions together, right or wrong."""
    parts = [np.asarray(right, dtype=bool) for right in one["tasks"].values()]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)


def task(right: Any, base: Any) -> dict[str, Any]:
    """A score, its paired difference, and how many answers changed sides."""
    now, was = np.asarray(right, dtype=bool), np.asarray(base, dtype=bool)
    return {
        **bootstrap(now).to_json(),
        "difference": bootstrap(now.astype(float), paired_with=was.astype(float)).to_json(),
        "changed": bootstrap(now != was).to_json(),
    }


def differences(one: Measured, start: Measured, floats: Measured) -> dict[str, Any]:
    """One model against another: its flips and KL as shares of the other's, and paired differences."""
    left = {f"{name}_left": ratio(one[name], start[name]) for name in ("flips", "kl")}
    found: dict[str, Any] = {
        **left,
        "nll": bootstrap(one["nll"], paired_with=start["nll"]).to_json(),
        "shared": bootstrap(one["shared"], paired_with=start["shared"]).to_json(),
        "margin": bootstrap(
            np.asarray(one["margin"]) / np.asarray(one["tokens"]),
            paired_with=np.asarray(start["margin"]) / np.asarray(start["tokens"]),
        ).to_json(),
        "fidelity": fidelity_numbers(closeness(one, floats), closeness(start, floats)),
        "tasks": {
            name: bootstrap(
                np.asarray(right, dtype=float), paired_with=np.asarray(start["tasks"][name], dtype=float)
            ).to_json()
            for name, right in one["tasks"].items()
        },
    }
    if pool(one).size:
        found["task_mean"] = bootstrap(pool(one).astype(float), paired_with=pool(start).astype(float)).to_json()
    return found


def closeness(one: Measured, floats: Measured) -> list[Closeness]:
    """How near each answer is to the float model's; likelihood under the float model is not asked for."""
    return [
        Closeness(theirs == own, prefix_share(theirs, own), rouge_l(theirs, own), 0.0)
        for theirs, own in zip(floats["answers"], one["answers"], strict=True)
    ]


def ratio(sums: Any, counts: Any) -> dict[str, Any]:
    """A ratio of two sums over prompts, the prompts resampled; 1 where both are nothing, at most MOST."""
    above, below = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    value = float(above.sum() / below.sum()) if below.sum() else (MOST if above.sum() else 1.0)
    low, high = (float(bound[0]) for bound in ratio_interval(above[:, None], below[:, None], seed=0))
    if np.isnan(high):  # between draws that are infinite, where there is something below at all
        high = MOST if below.sum() else value
    value, low, high = (min(MOST, value if np.isnan(x) else x) for x in (value, low, high))
    return Estimate(value, min(low, value), max(high, value), len(above)).to_json()
