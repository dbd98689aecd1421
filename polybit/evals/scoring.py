"""Scores that everybody computes alike, and how sure a mean is: SQuAD, GSM8K, exact match, the bootstrap."""

from __future__ import annotations

import math
import re
import string
import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polybit.core.records import Estimate
from polybit.core.runtime import PolybitError

Array = NDArray[np.float64]
RESAMPLES, CONFIDENCE = 1000, 0.95
PUNCTUATION = frozenset(string.punctuation)


def normalize_answer(text: str) -> str:
    """SQuAD's normaliser: lower case, no punctuation, no articles, single blanks (evaluate-v1.1, 2016)."""
    text = "".join(character for character in text.lower() if character not in PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_exact(prediction: str, answers: Sequence[str]) -> float:
    """SQuAD exact match: 1 when the normalised prediction equals one of the normalised answers, else 0."""
    found = normalize_answer(prediction)
    return float(any(found == normalize_answer(answer) for answer in answers))


def squad_f1(prediction: str, answers: Sequence[str]) -> float:
    """SQuAD F1 in 0..1: word overlap with the best answer, words counted as often as they occur."""
    return max((_overlap_f1(prediction, answer) for answer in answers), default=0.0)


def _overlap_f1(prediction: str, answer: str) -> float:
    found, wanted = normalize_answer(prediction).split(), normalize_answer(answer).split()
    same = sum((Counter(found) & Counter(wanted)).values())
    if not same:
        return 0.0
    precision, recall = same / len(found), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def gsm8k_number(text: str) -> str | None:
    """The final number of a rationale ending `#### n`, thousands separators removed; None where there is none.

    Unlike the official script, a full stop after the number is not part of it.
    """
    match = re.search(r"#### *(-?[0-9.,]+)", text)
    number = match.group(1).replace(",", "").rstrip(".") if match else ""
    return number if number.strip("-") else None


def gsm8k_exact(prediction: str, answer: str) -> float:
    """1 when the prediction's final number is the answer's, else 0; a prediction without one is wrong."""
    found = gsm8k_number(prediction)
    return float(found is not None and found == gsm8k_number(answer))


def gsm8k_any(prediction: str, answers: Sequence[str]) -> float:
    """gsm8k_exact against the best of several answers."""
    return max((gsm8k_exact(prediction, answer) for answer in answers), default=0.0)


def last_number(text: str) -> float | None:
    """The last number of a text, thousands separators removed (lm-eval's flexible extraction); None without one."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(found[-1].replace(",", "")) if found else None


def text_exact(prediction: str, answer: str) -> float:
    """1 when both texts are equal but for blanks at their ends, else 0."""
    return float(prediction.strip() == answer.strip())


def text_any(prediction: str, answers: Sequence[str]) -> float:
    """text_exact against the best of several answers."""
    return max((text_exact(prediction, answer) for answer in answers), default=0.0)


def bootstrap(
    values: ArrayLike,
    *,
    paired_with: ArrayLike | None = None,
    clusters: ArrayLike | None = None,
    seed: int = 0,
) -> Estimate:
    """Mean of `values` with its 95 % bootstrap interval; `n` of the estimate counts what was resampled.

    With `paired_with` it is the mean of the differences values - paired_with, item by item. With `clusters` (a label
    per value: the text window or the item it came from) whole clusters are drawn, since tokens of one text are alike;
    without, every value is its own cluster. Percentile interval over 1000 resamples of the mean (Efron 1979).
    Unlike the plain bootstrap, a yes/no rate that came out as exactly 0 or 1 gets the Clopper-Pearson bound for
    independent values on its open side, because resampling equal values would claim certainty.
    """
    raw = np.asarray(values)
    is_rate = raw.dtype == np.bool_ and paired_with is None
    data = raw.astype(np.float64)
    if paired_with is not None:
        other = np.asarray(paired_with, dtype=np.float64)
        if other.shape != data.shape:
            raise PolybitError(f"Paired values must match: {data.shape} against {other.shape}; give the same items.")
        data = data - other
    if data.ndim != 1 or not data.size:
        raise PolybitError(f"A mean needs a list of at least one value, got shape {data.shape}.")
    if not np.isfinite(data).all():
        raise PolybitError(f"{int((~np.isfinite(data)).sum())} of {data.size} values are NaN or infinite.")
    sums, counts = cluster_sums(data, clusters)
    value = float(data.mean())
    low, high = ratio_interval(sums[:, None], counts[:, None], seed=seed)
    bounds = (
        unanimous_interval(value, data.size) if is_rate and value in (0.0, 1.0) else (float(low[0]), float(high[0]))
    )
    # rounding in a resampled mean of equal values must not put the value outside its own interval
    return Estimate(value, min(bounds[0], value), max(bounds[1], value), len(sums))


def unanimous_interval(value: float, n: int) -> tuple[float, float]:
    """Clopper-Pearson interval of a rate when all of `n` values were no (value 0) or all were yes (value 1)."""
    slack = 1 - ((1 - CONFIDENCE) / 2) ** (1 / n)
    return (0.0, slack) if value == 0 else (1 - slack, 1.0)


def cluster_sums(data: Array, clusters: ArrayLike | None) -> tuple[Array, Array]:
    """Sum and number of the values of each cluster."""
    if clusters is None:
        return data, np.ones_like(data)
    labels = np.unique(np.asarray(clusters), return_inverse=True)[1]
    if labels.shape != data.shape:
        raise PolybitError(f"Every value needs a cluster: {data.shape} values, {labels.shape} labels.")
    return np.bincount(labels, weights=data).astype(np.float64), np.bincount(labels).astype(np.float64)


def ratio_interval(sums_CK: Array, counts_CK: Array, *, seed: int) -> tuple[Array, Array]:
    """Percentile interval of K ratios sum / count over resampled clusters C; nan where a resample had no counts."""
    clusters = len(sums_CK)
    generator = np.random.default_rng(seed)
    means_RK = np.empty((RESAMPLES, sums_CK.shape[1]))
    step = max(1, 4_000_000 // clusters)  # rows of draws at a time: 32 MB
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        drawn_RC = generator.integers(clusters, size=(rows, clusters))
        # how often each cluster was drawn, as one matrix: means then are a matrix product
        flat = (drawn_RC + np.arange(rows)[:, None] * clusters).ravel()
        weights_RC = np.bincount(flat, minlength=rows * clusters).reshape(rows, clusters).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            means_RK[start : start + rows] = (weights_RC @ sums_CK) / (weights_RC @ counts_CK)
    tail = 50 * (1 - CONFIDENCE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column without any count is nan, and may be
        low, high = np.nanpercentile(means_RK, [tail, 100 - tail], axis=0)
    return low, high


def rates_by_bin(
    events: NDArray[np.bool_], bins: ArrayLike, total: int, *, clusters: ArrayLike, seed: int = 0
) -> list[Estimate | None]:
    """How often `events` is true in each of `total` bins, whole clusters resampled; None for an empty bin.

    bins: the bin 0..total-1 of every value. An estimate's `n` counts the values in its bin.
    """
    labels = np.unique(np.asarray(clusters), return_inverse=True)[1]
    size = int(labels.max()) + 1
    cell = labels * total + np.asarray(bins)
    sums_CK = np.bincount(cell, weights=events, minlength=size * total).astype(np.float64).reshape(size, total)
    counts_CK = np.bincount(cell, minlength=size * total).astype(np.float64).reshape(size, total)
    found: list[Estimate | None] = []
    low_K, high_K = ratio_interval(sums_CK, counts_CK, seed=seed)
    for hits, n, low, high in zip(sums_CK.sum(0), counts_CK.sum(0), low_K, high_K, strict=True):
        if n and hits in (0, n):
            low, high = unanimous_interval(float(hits / n), int(n))
        found.append(Estimate(float(hits / n), float(low), float(high), int(n)) if n else None)
    return found


def exponentiate(estimate: Estimate) -> Estimate:
    """Perplexity of a mean negative log-likelihood in nats, its interval carried along."""
    # beyond e^700 a float overflows; such a model is noise, and JSON has no infinity
    value, low, high = (math.exp(min(nats, 700.0)) for nats in (estimate.value, estimate.low, estimate.high))
    return Estimate(value, low, high, estimate.n)
