"""Token flips: where a quantized model would choose another token than the float model, and how far apart they are.

Everything here is forward-only and teacher-forced but `first_divergence`, which compares greedy answers. Definitions
follow QDPO (arXiv 2407.03051): the flip rate, the margin between the two likeliest tokens, the first flipped token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polybit.core.runtime import PolybitError, track
from polybit.data.batches import buckets, pad
from polybit.evals.scoring import bootstrap, rates_by_bin, ratio_interval
from polybit.evals.sharing import Readers, Share
from polybit.hub.lm import LocalLM

Floats = NDArray[np.float64]
TokenColumns = tuple[Tensor, Tensor, dict[str | None, Tensor]]  # text numbers [N], reference [3, N], preset -> [4, N]
HISTOGRAM_BINS = 20


@dataclass(frozen=True, slots=True)
class ReferenceTokens:
    """What the float model says at each measured token; one entry per token, all arrays of equal length N.

    text_N: number of the window or answer the token stands in · nll_N: nats · margin_N: probability of the likeliest
    token minus that of the next · entropy_N: nats.
    """

    text_N: NDArray[np.int64]
    nll_N: Floats
    margin_N: Floats
    entropy_N: Floats


@dataclass(frozen=True, slots=True)
class QuantizedTokens:
    """What a quantized model says at the same tokens: kl_N is KL(float || quantized) in nats, agrees_N whether both
    models find the same token likeliest."""

    kl_N: Floats
    nll_N: Floats
    margin_N: Floats
    agrees_N: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to run at once: ids_BT int64, mask_BT True at the tokens whose prediction counts, text_B their numbers."""

    ids_BT: Tensor
    mask_BT: Tensor
    text_B: Tensor


def text_batches(lm: LocalLM, windows_NT: Tensor) -> list[Batch]:
    """Batches of whole windows: every token but the first counts."""
    rows = lm.rows_per_batch(windows_NT.shape[1])
    mask_NT = torch.ones_like(windows_NT, dtype=torch.bool)
    mask_NT[:, 0] = False
    numbers = torch.arange(len(windows_NT))
    parts = zip(windows_NT.split(rows), mask_NT.split(rows), numbers.split(rows), strict=True)
    return [Batch(*(column.clone() for column in part)) for part in parts]  # a view is sent with all it is a view of


def answer_batches(lm: LocalLM, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[Batch]:
    """Batches of prompt + answer where the tokens of the answer count, padded on the right; no answer, no row."""
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max((len(row) for row in rows), default=1)
    found = []
    for group in buckets([len(row) for row in rows], tokens=lm.batch_tokens, rows=lm.rows_per_batch(longest)):
        ids_BT, mask_BT = pad([rows[index] for index in group], lm.pad_token())
        for line, index in enumerate(group):
            mask_BT[line, : len(prompts[index])] = False
        found.append(Batch(ids_BT, mask_BT, torch.tensor(group)))
    return found


def measure_tokens(
    reference: LocalLM,
    quantized: LocalLM,
    presets: Sequence[str | None],
    batches: Sequence[Batch],
    *,
    label: str,
    share: Share | None = None,
) -> tuple[ReferenceTokens, dict[str | None, QuantizedTokens]]:
    """Compare both models token by token, at each preset; a preset of None reads the quantized model as it is.

    The reference runs once per batch whatever the number of presets, and only one batch of logits is alive at a time.
    share: who reads (default: this process)
    """
    texts: list[Tensor] = []
    reference_parts: list[Tensor] = []
    parts: dict[str | None, list[Tensor]] = {preset: [] for preset in presets}
    rows: Iterable[TokenColumns] = read_batches(reference, quantized, presets, batches)
    if isinstance(share, Readers):
        size = max(1, len(batches) // share.pieces)
        cuts = [(presets, batches[start : start + size]) for start in range(0, len(batches), size)]
        rows = chain.from_iterable(share(read_part, cuts))
    for numbers_N, of_reference, by_preset in track(rows, label, len(batches)):
        texts.append(numbers_N)
        reference_parts.append(of_reference)
        for preset, columns in by_preset.items():
            parts[preset].append(columns)
    text_N = torch.cat(texts).numpy()
    nll_N, margin_N, entropy_N = _columns(reference_parts, "The reference")
    tables = {}
    for preset, found in parts.items():
        kl_N, q_nll_N, q_margin_N, agrees_N = _columns(found, f"The quantized model at {preset or 'its own precision'}")
        tables[preset] = QuantizedTokens(kl_N, q_nll_N, q_margin_N, agrees_N > 0.5)
    return ReferenceTokens(text_N, nll_N, margin_N, entropy_N), tables


def read_part(
    reference: LocalLM, quantized: LocalLM, presets: Sequence[str | None], batches: Sequence[Batch]
) -> list[TokenColumns]:
    """`read_batches` at once, for a worker."""
    return list(read_batches(reference, quantized, presets, batches))


def read_batches(
    reference: LocalLM, quantized: LocalLM, presets: Sequence[str | None], batches: Sequence[Batch]
) -> Iterator[TokenColumns]:
    """What both models say at the counted tokens of each batch."""
    asked = [batch.ids_BT[:, :-1] for batch in batches]
    reference.read_ahead(asked, [None])
    quantized.read_ahead(asked, presets)
    for batch in batches:
        yield read_batch(reference, quantized, presets, batch)


@torch.no_grad()
def read_batch(reference: LocalLM, quantized: LocalLM, presets: Sequence[str | None], batch: Batch) -> TokenColumns:
    """One batch at every preset."""
    counted_BT = batch.mask_BT[:, 1:]
    target_BT = batch.ids_BT[:, 1:]
    logp_BTV = reference.logits(batch.ids_BT[:, :-1]).log_softmax(-1)
    p_BTV = logp_BTV.exp()
    top_BT2 = p_BTV.topk(2, dim=-1)
    entropy_BT = -torch.where(p_BTV > 0, p_BTV * logp_BTV, 0.0).sum(-1)
    margin_BT = top_BT2.values[..., 0] - top_BT2.values[..., 1]
    found = {}
    for preset in presets:
        with quantized.at(preset):
            logq_BTV = quantized.logits(batch.ids_BT[:, :-1])
        if logq_BTV.shape[-1] != logp_BTV.shape[-1]:
            raise PolybitError(
                f"The reference has a vocabulary of {logp_BTV.shape[-1]} and the quantized model one of "
                f"{logq_BTV.shape[-1]}; give the model it was made from as the reference."
            )
        columns = compare_logits(logp_BTV, p_BTV, logq_BTV.to(logp_BTV.device), top_BT2.indices[..., 0], target_BT)
        found[preset] = _select(counted_BT, *columns)
    text_N = batch.text_B[:, None].expand_as(counted_BT)[counted_BT]
    return text_N, _select(counted_BT, _nll(logp_BTV, target_BT), margin_BT, entropy_BT), found


def compare_logits(
    logp_BTV: Tensor, p_BTV: Tensor, logits_BTV: Tensor, top_BT: Tensor, target_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL(float || quantized), NLL of the target, margin and agreement with the float choice, each [B, T].

    KL is summed as p log(p/q) + q - p: the last two cancel in exact arithmetic, and in float32 they cancel the
    rounding of both normalisations, which at 8 bits would be as large as the KL itself.
    """
    logq_BTV = logits_BTV.log_softmax(-1)
    q_BTV = logq_BTV.exp()
    top_BT2 = q_BTV.topk(2, dim=-1)
    margin_BT = top_BT2.values[..., 0] - top_BT2.values[..., 1]
    terms_BTV = torch.where(p_BTV > 0, p_BTV * (logp_BTV - logq_BTV), 0.0).add_(q_BTV).sub_(p_BTV)
    agrees_BT = (top_BT2.indices[..., 0] == top_BT).float()
    return terms_BTV.sum(-1), _nll(logq_BTV, target_BT), margin_BT, agrees_BT


def _nll(logp_BTV: Tensor, target_BT: Tensor) -> Tensor:
    return -logp_BTV.gather(-1, target_BT.to(logp_BTV.device)[..., None])[..., 0]


def _select(counted_BT: Tensor, *columns_BT: Tensor) -> Tensor:
    """The counted tokens of several [B, T] tensors as [columns, tokens] on the CPU."""
    return torch.stack([column_BT.cpu()[counted_BT] for column_BT in columns_BT])


def _columns(parts: Sequence[Tensor], who: str) -> list[Floats]:
    table = torch.cat(list(parts), dim=1).double()
    bad = int((~torch.isfinite(table)).any(0).sum())
    if bad:
        raise PolybitError(
            f"{who} gives NaN or infinite probabilities at {bad} of {table.shape[1]} tokens; its weights are broken."
        )
    return [column.numpy() for column in table]


def rank_bins(values: Floats, total: int) -> NDArray[np.int64]:
    """Number 0..total-1 of each value's quantile bin, bins of equal size; equal values keep their order."""
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks * total // len(values)


def flips_by(values: Floats, tokens: QuantizedTokens, text_N: NDArray[np.int64], *, seed: int) -> list[dict[str, Any]]:
    """Flip rate by decile of a property of the float model (margin or entropy), lowest decile first.

    Each row has `from` and `to` (the smallest and largest value inside), the rate with its interval, and n tokens.
    """
    total = min(10, len(values))
    bins = rank_bins(values, total)
    rates = rates_by_bin(~tokens.agrees_N, bins, total, clusters=text_N, seed=seed)
    return [
        {"from": float(values[bins == k].min()), "to": float(values[bins == k].max()), **rate.to_json()}
        for k, rate in enumerate(rates)
        if rate is not None
    ]


def mean_by_text(values: Floats, text_N: NDArray[np.int64]) -> Floats:
    """Mean over the tokens of each text, texts in ascending order of their numbers."""
    labels = np.unique(text_N, return_inverse=True)[1]
    return np.bincount(labels, weights=values) / np.bincount(labels)


def margin_summary(reference: ReferenceTokens, tokens: QuantizedTokens, *, seed: int) -> dict[str, Any]:
    """Mean top-1/top-2 margin of each text in both models: histograms over 0..1, means, paired difference.

    Source: QDPO, figure 3b.
    """
    ours = mean_by_text(tokens.margin_N, reference.text_N)
    theirs = mean_by_text(reference.margin_N, reference.text_N)
    edges = np.linspace(0, 1, HISTOGRAM_BINS + 1)
    return {
        "edges": edges.round(4).tolist(),
        "reference": np.histogram(theirs.clip(0, 1), edges)[0].tolist(),
        "quantized": np.histogram(ours.clip(0, 1), edges)[0].tolist(),
        "reference_mean": bootstrap(theirs, seed=seed).to_json(),
        "quantized_mean": bootstrap(ours, seed=seed).to_json(),
        "difference": bootstrap(ours, paired_with=theirs, seed=seed).to_json(),
    }


def first_divergence(reference: Sequence[int], quantized: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ, None when they are the same."""
    for index, (ours, theirs) in enumerate(zip(quantized, reference, strict=False)):
        if ours != theirs:
            return index
    return None if len(reference) == len(quantized) else min(len(reference), len(quantized))


def survival(stars: Sequence[int | None], horizon: int, *, seed: int) -> dict[str, list[float]]:
    """P(t* > k) for k = 0 .. horizon - 1: the share of answers whose first k + 1 tokens are still the float model's.

    An answer that never diverges survives every k. Keys: survival, survival_low, survival_high (95 %, per k).
    """
    index_N = np.array([horizon if star is None else star for star in stars])
    alive_NK = (index_N[:, None] > np.arange(horizon)).astype(np.float64)
    low, high = ratio_interval(alive_NK, np.ones_like(alive_NK), seed=seed)
    return {"survival": alive_NK.mean(0).tolist(), "survival_low": low.tolist(), "survival_high": high.tolist()}
