"""Fit a router to measured harms; judge it on other prompts, against fixed widths, random routing and the oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polybit.serve.router import SMALL, Array, Router

FOLDS = 5
RIDGES = (0.1, 1.0, 10.0, 100.0, 1000.0)  # of features of unit spread; chosen by folds
RESAMPLES = 1000
POINTS = 25  # prices of a curve


@dataclass(frozen=True)
class RoutingCurve:
    """One way of routing at rising budgets: mean bits and mean harm in nats per token, both [P]."""

    bits_P: Array
    harm_P: Array

    def at(self, bits: Array) -> Array:
        """Harm at other budgets, on straight lines between the points: two neighbours mixed at random."""
        order = np.argsort(self.bits_P)
        return np.interp(bits, self.bits_P[order], self.harm_P[order])


def fit(
    features_NF: Array,
    harms_NW: Array,
    bits: Sequence[float],
    widths: Sequence[str],
    basis_DK: Array,
    budget: float,
    states_EK: Array | None = None,
) -> Router:
    """The router of all prompts, its ridge chosen by folds, its price such that these prompts meet the budget."""
    states_EK = np.empty((0, 0)) if states_EK is None else states_EK
    ridge = best_ridge(features_NF, np.log(harms_NW + SMALL))
    mean_F, spread_F, coefficients = ridge_fit(features_NF, np.log(harms_NW + SMALL), ridge)
    bits_W = np.asarray(bits, dtype=np.float64)
    router = Router(tuple(widths), bits_W, mean_F, spread_F, coefficients, basis_DK, states_EK, 0.0, budget)
    return replace(router, price=price_for(router.harms(features_NF), bits_W, budget))


def ridge_fit(features_NF: Array, logs_NW: Array, ridge: float) -> tuple[Array, Array, Array]:
    """(mean, spread, coefficients [W, F + 1]) of a linear model with a penalty on all but the constant."""
    mean_F, spread_F = features_NF.mean(0), features_NF.std(0)
    spread_F = np.where(spread_F > 1e-9, spread_F, 1.0)
    scaled = (features_NF - mean_F) / spread_F
    centre_W = logs_NW.mean(0)
    gram = scaled.T @ scaled + ridge * np.eye(scaled.shape[1])
    slopes_FW = np.linalg.solve(gram, scaled.T @ (logs_NW - centre_W))
    return mean_F, spread_F, np.concatenate([slopes_FW.T, centre_W[:, None]], axis=1)


def predicted(features_NF: Array, fitted: tuple[Array, Array, Array]) -> Array:
    """Log harms [N, W] of a fitted model."""
    mean_F, spread_F, coefficients = fitted
    return (features_NF - mean_F) / spread_F @ coefficients[:, :-1].T + coefficients[:, -1]


def folds_of(count: int, seed: int = 0) -> NDArray[np.int64]:
    """Which fold every prompt is in."""
    return np.random.default_rng(seed).permutation(count) % min(FOLDS, count)


def crossed(features_NF: Array, logs_NW: Array, ridge: Callable[[Array, Array], float]) -> Array:
    """Log harms [N, W], each told by a model that did not see the prompt."""
    folds = folds_of(len(features_NF))
    told = np.empty_like(logs_NW)
    for fold in np.unique(folds):
        seen, new = folds != fold, folds == fold
        fitted = ridge_fit(features_NF[seen], logs_NW[seen], ridge(features_NF[seen], logs_NW[seen]))
        told[new] = predicted(features_NF[new], fitted)
    return told


def best_ridge(features_NF: Array, logs_NW: Array) -> float:
    """The penalty that tells unseen prompts best."""
    errors = [float(((crossed(features_NF, logs_NW, lambda *_, r=r: r) - logs_NW) ** 2).mean()) for r in RIDGES]
    return RIDGES[int(np.argmin(errors))]


def price_for(harms_NW: Array, bits_W: Array, budget: float) -> float:
    """The least price at which the mean of the chosen bits is within the budget."""
    low, high = 0.0, 1e6
    if mean_bits(harms_NW, bits_W, low) <= budget:
        return low
    for _ in range(100):
        middle = (low + high) / 2 if low else high / 2
        if mean_bits(harms_NW, bits_W, middle) <= budget:
            high = middle
        else:
            low = middle
    return high


def chosen(harms_NW: Array, bits_W: Array, price: float) -> NDArray[np.int64]:
    """Number of the width each prompt gets."""
    return np.argmin(harms_NW + price * bits_W, axis=1)


def mean_bits(harms_NW: Array, bits_W: Array, price: float) -> float:
    """Mean bits at a price."""
    return float(bits_W[chosen(harms_NW, bits_W, price)].mean())


def curve(told_NW: Array, true_NW: Array, bits_W: Array, prices: Array) -> RoutingCurve:
    """Routing by told harms, judged by the true ones."""
    bits, harms = [], []
    for price in prices:
        choice = chosen(told_NW, bits_W, price)
        bits.append(bits_W[choice].mean())
        harms.append(true_NW[np.arange(len(choice)), choice].mean())
    return RoutingCurve(np.asarray(bits), np.asarray(harms))


def judge(
    features_NF: Array, harms_NW: Array, bits: Sequence[float], budget: float, *, seed: int = 0
) -> dict[str, Any]:
    """Everything the report shows, each prompt routed by a model that never saw it.

    Random routing gives widths in the router's own shares to prompts drawn at random: equal cost, no knowledge. The
    area is the mean over the budgets between the narrowest and the widest of (random - router) in nats per token; its
    interval resamples prompts (percentile, 95 %).
    """
    bits_W = np.asarray(bits, dtype=np.float64)
    told_NW = np.exp(crossed(features_NF, np.log(harms_NW + SMALL), best_ridge))
    prices = prices_of(told_NW, bits_W)
    router, oracle = (
        curve(told_NW, harms_NW, bits_W, prices),
        curve(harms_NW, harms_NW, bits_W, prices_of(harms_NW, bits_W)),
    )
    gain_N, gain_PN = gains(told_NW, harms_NW, bits_W, prices)
    draws = np.random.default_rng(seed).integers(len(gain_N), size=(RESAMPLES, len(gain_N)))
    low, high = np.percentile(gain_N[draws].mean(1), [2.5, 97.5])
    at_budget = chosen(told_NW, bits_W, price_for(told_NW, bits_W, budget))
    shares = np.bincount(at_budget, minlength=len(bits_W)) / len(at_budget)
    own = harms_NW[np.arange(len(at_budget)), at_budget]
    difference_N = harms_NW @ shares - own
    spread = np.percentile(difference_N[draws].mean(1), [2.5, 97.5])
    best = chosen(harms_NW, bits_W, price_for(harms_NW, bits_W, budget))
    return {
        "prompts": len(gain_N),
        "area": {"value": float(gain_N.mean()), "low": float(low), "high": float(high), "n": len(gain_N)},
        "curves": {
            "router": {"bits": router.bits_P.tolist(), "harm": router.harm_P.tolist()},
            "random": {"bits": router.bits_P.tolist(), "harm": (router.harm_P + gain_PN.mean(1)).tolist()},
            "oracle": {"bits": oracle.bits_P.tolist(), "harm": oracle.harm_P.tolist()},
            "fixed": {"bits": bits_W.tolist(), "harm": harms_NW.mean(0).tolist()},
        },
        "at_budget": {
            "budget": budget,
            "bits": float(bits_W[at_budget].mean()),
            "shares": shares.tolist(),
            "router": float(own.mean()),
            "random": float((harms_NW @ shares).mean()),
            "difference": {
                "value": float(difference_N.mean()),
                "low": float(spread[0]),
                "high": float(spread[1]),
                "n": len(gain_N),
            },
            "oracle": float(harms_NW[np.arange(len(best)), best].mean()),
        },
    }


def prices_of(harms_NW: Array, bits_W: Array) -> Array:
    """Prices whose mean bits go evenly from the narrowest to the widest."""
    budgets = np.linspace(bits_W.min(), bits_W.max(), POINTS)
    return np.asarray([price_for(harms_NW, bits_W, budget) for budget in budgets])


def gains(told_NW: Array, true_NW: Array, bits_W: Array, prices: Array) -> tuple[Array, Array]:
    """What routing saves every prompt against random routing in the same shares: mean over budgets [N], and [P, N]."""
    rows = []
    for price in prices:
        choice = chosen(told_NW, bits_W, price)
        shares = np.bincount(choice, minlength=len(bits_W)) / len(choice)
        rows.append(true_NW @ shares - true_NW[np.arange(len(choice)), choice])
    gain_PN = np.stack(rows)
    return gain_PN.mean(0), gain_PN
