"""How thin a lead must be that a gate decides it: learnt from held-out answers, and judged on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polybit.hub.rows import TokenRows
from polybit.serve.runners import Runner

Array = NDArray[np.float64]
TARGET = 0.95  # of the flips are to be removed
RESAMPLES = 1000
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)  # of the flips removed: points of the frontier


@dataclass(frozen=True, slots=True)
class GateReading:
    """Of every token of some answers: the lead at the low width in nats, whether it is another than the high width's,
    and which answer it is of."""

    lead_N: Array
    flip_N: NDArray[np.bool_]
    answer_N: NDArray[np.int64]

    def part(self, kept: NDArray[np.bool_]) -> GateReading:
        """The tokens of some answers."""
        chosen = kept[self.answer_N]
        return GateReading(self.lead_N[chosen], self.flip_N[chosen], self.answer_N[chosen])


def read_pair(
    runner: Runner,
    low: str,
    high: str,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    each: Callable[[], None] = lambda: None,
) -> GateReading:
    """Read answers at both widths after prompts read at the high one. Uses the runner's first two places."""
    narrow, wide = runner.setting(low), runner.setting(high)
    leads, flips, owners = [], [], []
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        text, start, count = [*prompt, *answer], len(prompt) - 1, len(answer)
        both = [TokenRows(wide, slot, 0, text[:start]) for slot in (0, 1) if start]
        runner.read(both, [0] * len(both))
        rest = text[start:-1]
        at_low, at_high = runner.read(
            [TokenRows(narrow, 0, start, rest), TokenRows(wide, 1, start, rest)], [count, count]
        )
        best = at_low.topk(2, dim=-1)
        leads += (best.values[:, 0] - best.values[:, 1]).tolist()
        flips += (best.indices[:, 0] != at_high.argmax(-1)).tolist()
        owners += [index] * count
        each()
    return GateReading(np.asarray(leads), np.asarray(flips, dtype=bool), np.asarray(owners))


def margin_for(reading: GateReading, target: float = TARGET) -> float:
    """The least margin in nats under which the leads of so large a share of the flips lie; 0 where nothing flips."""
    flipped = np.sort(reading.lead_N[reading.flip_N])
    if not len(flipped):
        return 0.0
    last = flipped[min(len(flipped) - 1, int(np.ceil(target * len(flipped))) - 1)]
    return float(np.nextafter(last, np.inf))


def outcome(reading: GateReading, margin: float) -> tuple[float, float]:
    """(share of the flips under the margin, share of tokens under it)."""
    gated_N = reading.lead_N < margin
    flips = max(int(reading.flip_N.sum()), 1)
    return float((gated_N & reading.flip_N).sum() / flips), float(gated_N.mean())


def fit_gate(reading: GateReading, ratio: float, *, seed: int = 0) -> dict[str, Any]:
    """The margin, learnt from one half of the answers, and what it does to the other; the frontier of all margins.

    ratio: bytes that the gate reads over those of the low width. Intervals (95 %) resample answers.
    """
    count = int(reading.answer_N.max()) + 1
    learnt = np.random.default_rng(seed).permutation(count) < count // 2
    margin, held_out = margin_for(reading.part(learnt)), reading.part(~learnt)
    removed, gated = outcome(held_out, margin)
    others = np.flatnonzero(~learnt)
    tokens_A, gated_A, flips_A, caught_A = (
        np.bincount(reading.answer_N, weights=weights, minlength=count)[others]
        for weights in (
            np.ones(len(reading.lead_N)),
            reading.lead_N < margin,
            reading.flip_N,
            reading.flip_N & (reading.lead_N < margin),
        )
    )
    draws = np.random.default_rng(seed).integers(len(others), size=(RESAMPLES, len(others)))
    removals = caught_A[draws].sum(1) / np.maximum(flips_A[draws].sum(1), 1)
    extras = ratio * gated_A[draws].sum(1) / np.maximum(tokens_A[draws].sum(1), 1)
    curve = [(share, margin_for(reading, share)) for share in SHARES]
    return {
        "margin": margin,
        "answers": len(others),
        "tokens": int(tokens_A.sum()),
        "flips": float(flips_A.sum() / max(tokens_A.sum(), 1)),
        "removed": {"value": removed, "low": float(np.percentile(removals, 2.5)),
                    "high": float(np.percentile(removals, 97.5)), "n": len(others)},
        "gated": gated,
        "extra_bytes": {"value": ratio * gated, "low": float(np.percentile(extras, 2.5)),
                        "high": float(np.percentile(extras, 97.5)), "n": len(others)},
        "frontier": [{"removed": share, "margin": at, "extra_bytes": ratio * outcome(reading, at)[1]}
                     for share, at in curve],
    }  # fmt: skip
