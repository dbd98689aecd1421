"""An offline judge of FIDELITY: which of two answers is closer to the float model's. It says nothing about quality.

Deterministic, needs no network. Criteria in order: equal to the float answer; longer common prefix; higher ROUGE-L;
likelier under the float model. A criterion decides only when the two differ by more than its threshold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from polybit.core.runtime import track
from polybit.evals.scoring import bootstrap
from polybit.evals.token_flip import answer_batches, first_divergence
from polybit.hub.lm import LocalLM

CRITERIA = ("exact", "prefix", "rouge_l", "nats")
LABEL = "fidelity: closeness to the float model's own answer, not quality"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Differences that still are a tie: share of the float answer's tokens, ROUGE-L in 0..1, nats per token."""

    prefix: float = 0.02
    rouge_l: float = 0.02
    nats: float = 0.02


@dataclass(frozen=True, slots=True)
class Closeness:
    """How close an answer is to the float model's; nats: mean log-probability per token under the float model, <= 0."""

    exact: bool
    prefix: float
    rouge_l: float
    nats: float


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common subsequence, bit-parallel: a column of the table is one integer (Hyyrö 2004)."""
    places: dict[int, int] = {}
    for index, symbol in enumerate(first):
        places[symbol] = places.get(symbol, 0) | 1 << index
    full = (1 << len(first)) - 1
    column = full
    for symbol in second:
        matched = column & places.get(symbol, 0)
        column = ((column + matched) | (column - matched)) & full
    return len(first) - column.bit_count()


def rouge_l(reference: Sequence[int], answer: Sequence[int]) -> float:
    """ROUGE-L F1 in 0..1 over token ids, so that it needs no words and works in every language (Lin 2004)."""
    if not reference or not answer:
        return float(not reference and not answer)
    common = common_length(reference, answer)
    return 2 * common / (len(reference) + len(answer))


def prefix_share(reference: Sequence[int], answer: Sequence[int]) -> float:
    """Share of the reference's tokens before the first that differs; 1 for equal answers."""
    star = first_divergence(reference, answer)
    return 1.0 if star is None else star / max(len(reference), len(answer))


def closeness(reference: Sequence[int], answer: Sequence[int], nats: float) -> Closeness:
    """All criteria for one answer."""
    return Closeness(list(reference) == list(answer), prefix_share(reference, answer), rouge_l(reference, answer), nats)


@torch.no_grad()
def mean_logprob(
    lm: LocalLM, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, label: str = "log-probs"
) -> list[float]:
    """Mean log-probability per token of each answer after its prompt, nats; -inf for an empty answer.

    A row longer than the model's context loses the first tokens of its prompt.
    """
    kept = list(prompts)
    if lm.max_length is not None:
        rooms = [max(1, lm.max_length + 1 - len(answer)) for answer in answers]
        kept = [prompt[-room:] for prompt, room in zip(prompts, rooms, strict=True)]
    found = [-np.inf] * len(answers)
    rows = [n for n, answer in enumerate(answers) if answer]
    batches = answer_batches(lm, [kept[n] for n in rows], [answers[n] for n in rows])
    for batch in track(batches, label):
        logp_BTV = lm.logits(batch.ids_BT[:, :-1]).log_softmax(-1)
        target_BT = batch.ids_BT[:, 1:].to(logp_BTV.device)
        logp_BT = logp_BTV.gather(-1, target_BT[..., None])[..., 0].double().cpu()
        counted_BT = batch.mask_BT[:, 1:]
        for row, number in enumerate(batch.text_B.tolist()):
            found[rows[number]] = float(logp_BT[row][counted_BT[row]].mean())
    return found


def answer_lead(
    lm: LocalLM, prompts: Sequence[Sequence[int]], answers: Sequence[str], encode: Callable[[str], list[int]]
) -> str:
    """What stands before an answer in the model's own writing, "" or " ": the one under which its answers are likelier.

    Texts are kept without outer blanks, but many tokenizers begin a word with its blank: read back without it, the
    first word would be one the model never writes there.
    """
    totals = {}
    for lead in ("", " "):
        tokens = [encode(lead + text) for text in answers]
        nats = mean_logprob(lm, prompts, tokens, label="beginnings of answers")
        totals[lead] = sum(value * len(ids) for value, ids in zip(nats, tokens, strict=True) if ids)
    return max(totals, key=lambda lead: totals[lead])


def prefer(ours: Closeness, theirs: Closeness, ties: Thresholds = Thresholds()) -> tuple[str, str]:
    """(win, tie or lose of `ours`, the criterion that decided or "none")."""
    if ours.exact != theirs.exact:
        return ("win" if ours.exact else "lose"), "exact"
    for name in CRITERIA[1:]:
        a, b = getattr(ours, name), getattr(theirs, name)
        if a != b and abs(a - b) > getattr(ties, name):  # two empty answers are both -inf, and equal
            return ("win" if a > b else "lose"), name
    return "tie", "none"


def fidelity_numbers(
    ours: Sequence[Closeness],
    theirs: Sequence[Closeness],
    *,
    clusters: Sequence[Any] | None = None,
    ties: Thresholds = Thresholds(),
    seed: int = 0,
) -> dict[str, Any]:
    """Rates of win, tie and lose of `ours` against `theirs`, item by item, whole clusters (questions) resampled."""
    verdicts = [prefer(a, b, ties) for a, b in zip(ours, theirs, strict=True)]
    numbers: dict[str, Any] = {"judge": LABEL, "games": len(verdicts)}
    for name in ("win", "tie", "lose"):
        hits = np.array([verdict == name for verdict, _ in verdicts])
        numbers[name] = bootstrap(hits, clusters=clusters, seed=seed).to_json()
    worth = [{"win": 1.0, "tie": 0.0, "lose": -1.0}[verdict] for verdict, _ in verdicts]
    numbers["win_minus_lose"] = bootstrap(worth, clusters=clusters, seed=seed).to_json()
    return numbers | {"decided_by": dict(Counter(criterion for _, criterion in verdicts))}


def closeness_numbers(
    found: Sequence[Closeness], *, clusters: Sequence[Any] | None = None, seed: int = 0
) -> dict[str, Any]:
    """Means of the criteria; answers without tokens have no log-probability and are left out of that mean."""
    numbers: dict[str, Any] = {}
    for name in CRITERIA:
        kept = [n for n, item in enumerate(found) if np.isfinite(getattr(item, name))]
        values = np.array([getattr(found[n], name) for n in kept])
        labels = None if clusters is None else [clusters[n] for n in kept]
        numbers[name] = bootstrap(values, clusters=labels, seed=seed).to_json() if kept else None
    return numbers
