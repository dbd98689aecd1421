"""The metrics, each a function of what both models said at one preset; their names and titles stand in table.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from polybit.core.records import Estimate
from polybit.evals.readings import PairedReading
from polybit.evals.scoring import bootstrap, exponentiate
from polybit.evals.token_flip import flips_by, margin_summary

# on the text ---------------------------------------------------------------------------------------------------


def perplexity(seen: PairedReading) -> Estimate:
    """exp(mean nats per token) of the quantized model."""
    return exponentiate(seen.mean(seen.text.quantized.nll_N))


def delta_nll(seen: PairedReading) -> Estimate:
    """Nats per token more than the float model, paired token by token."""
    return seen.mean(seen.text.quantized.nll_N, seen.text.reference.nll_N)


def kl(seen: PairedReading) -> Estimate:
    """KL(float || quantized), nats per token."""
    return seen.mean(seen.text.quantized.kl_N)


def kl_p999(seen: PairedReading) -> float:
    """99.9th percentile over tokens of KL(float || quantized), nats."""
    return float(np.quantile(seen.text.quantized.kl_N, 0.999))


def top1(seen: PairedReading) -> Estimate:
    """Share of tokens for which both models find the same one likeliest."""
    return seen.mean(seen.text.quantized.agrees_N)


def flips_text(seen: PairedReading) -> Estimate:
    """Share of tokens for which they find different ones likeliest."""
    return seen.mean(~seen.text.quantized.agrees_N)


def margins(seen: PairedReading) -> dict[str, Any]:
    """Mean margins of each text in both models, see `margin_summary`."""
    return margin_summary(seen.text.reference, seen.text.quantized, seed=seen.seed)


def flips_by_margin(seen: PairedReading) -> list[dict[str, Any]]:
    """Flips by decile of the float model's margin."""
    reference = seen.text.reference
    return flips_by(reference.margin_N, seen.text.quantized, reference.text_N, seed=seen.seed)


def flips_by_entropy(seen: PairedReading) -> list[dict[str, Any]]:
    """Flips by decile of the float model's entropy."""
    reference = seen.text.reference
    return flips_by(reference.entropy_N, seen.text.quantized, reference.text_N, seed=seen.seed)


# on answers ----------------------------------------------------------------------------------------------------


def flips(seen: PairedReading) -> Estimate | None:
    """Flips at the tokens of the float model's own answers; whole answers resampled."""
    if seen.own is None:
        return None
    return bootstrap(~seen.own.quantized.agrees_N, clusters=seen.own.reference.text_N, seed=seen.seed)


def first_divergence(seen: PairedReading) -> Estimate | None:
    """Tokens both answers share before they part; an answer that never parts counts whole."""
    stars = seen.answers.stars
    shared = [len(theirs) if star is None else star for star, theirs in zip(stars, seen.answers.reference, strict=True)]
    return bootstrap(shared, seed=seen.seed) if shared else None


def identical(seen: PairedReading) -> Estimate | None:
    """Share of answers that never part."""
    same = np.array([star is None for star in seen.answers.stars])
    return bootstrap(same, seed=seen.seed) if len(same) else None


def survival_mean(seen: PairedReading) -> list[float]:
    """P(t* > k), t* = the first token in which two answers differ."""
    return seen.survival["survival"]


def survival_low(seen: PairedReading) -> list[float]:
    """The lower end of its interval."""
    return seen.survival["survival_low"]


def survival_high(seen: PairedReading) -> list[float]:
    """The upper end of its interval."""
    return seen.survival["survival_high"]


# of the float model alone --------------------------------------------------------------------------------------


def float_perplexity(seen: PairedReading) -> Estimate:
    """exp(mean nats per token)."""
    return exponentiate(seen.mean(seen.text.reference.nll_N))


def float_margin(seen: PairedReading) -> Estimate:
    """Probability of the likeliest token minus that of the next."""
    return seen.mean(seen.text.reference.margin_N)


def float_entropy(seen: PairedReading) -> Estimate:
    """Nats."""
    return seen.mean(seen.text.reference.entropy_N)
