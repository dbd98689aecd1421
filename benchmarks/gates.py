"""Gates: what share of a narrow width's flips goes away when unsure tokens are decided at a wider one, at what bytes.

    python benchmarks/gates.py DIR --prompts FILE --pairs w4:w8,w3:w8 --json rows.json

The high width answers the prompts greedily. Every token of its answers is then chosen again at the low width, after the
same text, and by the gate: the newest token at the high width, all before it as the low width left them. A score says
how unsure the low width is; tokens are gated from the least sure on. Extra bytes are those of the gate's reading over
those of the low width alone. The fitted score is a logistic model of the others, told for each half of the prompts by
the other half. Intervals resample prompts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from polybit.core.records import machine
from polybit.data.chat import encode_prompt
from polybit.data.prompts import gather_prompts
from polybit.data.text import has_chat_template
from polybit.hub.models import open_model
from polybit.hub.rows import TokenRows
from polybit.serve.loading import bytes_read, ends_of
from polybit.serve.runners import RowRunner

SCORES = ("margin", "gap of shares", "share of the first", "entropy", "fitted")
SHARE, EXTRA = 0.9, 0.3  # of flips removed; of bytes
RESAMPLES = 300
Array = NDArray[np.float64]


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", default="w4:w8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer = open_model(given.checkpoint)
    found = gather_prompts(given.prompts, chat=has_chat_template(tokenizer), limit=given.count)
    prompts = [encode_prompt(tokenizer, prompt) for prompt in found]
    runner = RowRunner(model, slots=1, room=max(map(len, prompts)) + given.tokens + 1)
    ends = ends_of(model, tokenizer)
    pairs = [tuple(pair.split(":")) for pair in given.pairs.split(",")]
    size = bytes_read(model, tuple({name for pair in pairs for name in pair}))
    rows = []
    for low, high in pairs:
        seen = [
            watched(runner, low, high, prompt, answered(runner, high, prompt, ends, given.tokens)) for prompt in prompts
        ]
        rows += judged(low, high, [one for one in seen if len(one["low"])], size[high] / size[low])
        for row in rows[-len(SCORES) :]:
            print(json.dumps(row), flush=True)
    if given.json is not None:
        kept = {"machine": machine(), "config": vars(given) | {"json": ""}, "rows": rows}
        given.json.write_text(json.dumps(kept, indent=1) + "\n")


def answered(runner: RowRunner, width: str, prompt: list[int], ends: frozenset[int], most: int) -> list[int]:
    """The greedy answer, its ending token included."""
    setting, answer, rows = runner.setting(width), [], list(prompt)
    start = 0
    while len(answer) < most and not (answer and answer[-1] in ends):
        logits_V = runner.read([TokenRows(setting, 0, start, rows)], [1])[0][0]
        start += len(rows)
        rows = [int(logits_V.argmax())]
        answer += rows
    return answer


def watched(runner: RowRunner, low: str, high: str, prompt: list[int], answer: list[int]) -> dict[str, Array]:
    """Of every token of an answer: whether the low width and the gate choose another, and the low width's scores."""
    found: dict[str, list[Any]] = {"low": [], "gate": [], "scores": []}
    runner.read([TokenRows(runner.setting(low), 0, 0, prompt[:-1])], [0])
    text = [*prompt, *answer]
    for at in range(len(prompt) - 1, len(text) - 1):
        gate, one = (
            runner.read([TokenRows(runner.setting(width), 0, at, text[at : at + 1])], [1])[0][0]
            for width in (high, low)
        )
        found["low"].append(int(one.argmax()) != text[at + 1])
        found["gate"].append(int(gate.argmax()) != text[at + 1])
        found["scores"].append(scores_of(one))
    return {key: np.asarray(value, dtype=np.float64) for key, value in found.items()}


def scores_of(logits_V: Tensor) -> list[float]:
    """Every score but the fitted one; more is surer."""
    share_V = logits_V.double().softmax(-1)
    entropy = -float((share_V * share_V.clamp(min=1e-30).log()).sum())
    logits, shares = logits_V.topk(2).values.tolist(), share_V.topk(2).values.tolist()
    return [logits[0] - logits[1], shares[0] - shares[1], shares[0], -entropy]


def judged(low: str, high: str, seen: list[dict[str, Array]], ratio: float) -> list[dict[str, Any]]:
    """One row per score."""
    of_prompt = np.concatenate([np.full(len(one["low"]), number) for number, one in enumerate(seen)])
    wrong_low, wrong_gate = (np.concatenate([one[key] for one in seen]) for key in ("low", "gate"))
    scores_NS = np.concatenate([one["scores"] for one in seen])
    scores_NS = np.concatenate([scores_NS, fitted(scores_NS, wrong_low, of_prompt % 2)[:, None]], axis=1)
    draw = np.random.default_rng(0)
    resampled = []
    for _ in range(RESAMPLES):
        chosen = draw.integers(len(seen), size=len(seen))
        resampled.append(np.concatenate([np.flatnonzero(of_prompt == number) for number in chosen]))
    rows = []
    for name, score_N in zip(SCORES, scores_NS.T, strict=True):
        removed, extra, threshold = bars(score_N, wrong_low, wrong_gate, ratio)
        drawn = np.asarray([bars(score_N[i], wrong_low[i], wrong_gate[i], ratio)[:2] for i in resampled])
        rows.append(
            {
                "low": low,
                "gate": high,
                "score": name,
                "tokens": len(score_N),
                "flips": float(wrong_low.mean()),
                "flips_with_every_token_gated": float(wrong_gate.mean()),
                "removed_at_extra": removed,
                "removed_interval": np.percentile(drawn[:, 0], [2.5, 97.5]).tolist(),
                "extra_for_share": extra,
                "extra_interval": np.percentile(drawn[:, 1], [2.5, 97.5]).tolist(),
                "threshold": threshold,
            }
        )
    return rows


def bars(score_N: Array, wrong_low: Array, wrong_gate: Array, ratio: float) -> tuple[float, float, float]:
    """(share of flips removed at EXTRA more bytes, extra bytes that remove SHARE of them, the score up to there)."""
    order = np.argsort(score_N, kind="stable")
    saved = np.concatenate([[0.0], np.cumsum((wrong_low - wrong_gate)[order])])
    removed = saved / max(wrong_low.sum(), 1.0)
    extra = np.arange(len(removed)) / len(score_N) * ratio
    enough = np.flatnonzero(removed >= SHARE)
    place = int(enough[0]) if len(enough) else -1
    threshold = float(score_N[order[place - 1]]) if place > 0 else float("inf")
    return float(removed[extra <= EXTRA].max()), float(extra[place]) if place >= 0 else float(ratio), threshold


def fitted(scores_NS: Array, wrong_N: Array, half_N: Array) -> Array:
    """How sure a logistic model of logarithms of the scores is, each half told by the other."""
    columns = [np.log(scores_NS[:, 0] + 1e-3), np.log(scores_NS[:, 1] + 1e-6), np.log1p(-scores_NS[:, 2] + 1e-9)]
    columns.append(np.log(1e-6 - scores_NS[:, 3]))
    features = torch.tensor(np.stack([*columns, columns[0] ** 2, columns[3] ** 2], axis=1))
    features = (features - features.mean(0)) / features.std(0)
    told = np.empty(len(wrong_N))
    for half in (0, 1):
        seen = torch.tensor(half_N != half)
        weight = torch.zeros(features.shape[1] + 1, dtype=torch.float64, requires_grad=True)
        steps = torch.optim.LBFGS([weight], max_iter=100)

        def loss(seen: Tensor = seen, weight: Tensor = weight, steps: Any = steps) -> Tensor:
            steps.zero_grad()
            logits = features[seen] @ weight[:-1] + weight[-1]
            wrong = torch.tensor(wrong_N)[seen]
            value = torch.nn.functional.binary_cross_entropy_with_logits(logits, wrong) + 1e-3 * weight.square().sum()
            value.backward()
            return value

        steps.step(loss)
        with torch.no_grad():
            told[half_N == half] = -(features @ weight[:-1] + weight[-1]).numpy()[half_N == half]
    return told


if __name__ == "__main__":
    main()
