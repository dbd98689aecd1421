"""Gates: what share of a narrow width's flips goes away when unsure tokens are decided at a wider one, at what bytes.

    python benchmarks/gates.py DIR --prompts FILE --pairs w4:w8,w5:w8 --margins 0.5,1,2 --json rows.json

The high width answers the prompts greedily. Every token of its answers is then chosen again after the same text: by the
low width alone, which also reads the prompt, and with a gate, which reads the prompt at the high width and, where the
low width's lead is under the margin, all since the last gated token. A flip is a token that differs. Extra bytes are
those of the gate's readings of the weights over those of the low width. Intervals resample prompts.

With --served the engine answers the prompts itself, by the low width and through the gate, and the high width reads
what they wrote: a flip is a token that it would have chosen otherwise after the same text.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from polybit.core.records import machine
from polybit.data.chat import encode_prompt
from polybit.data.prompts import gather_prompts
from polybit.data.text import has_chat_template
from polybit.hub.models import open_model
from polybit.hub.rows import TokenRows
from polybit.serve.engine import Engine
from polybit.serve.loading import bytes_read, ends_of
from polybit.serve.request import Decoding, Request, Sampling
from polybit.serve.runners import RowRunner

RESAMPLES = 1000
Array = NDArray[np.float64]


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--pairs", default="w4:w8")
    parser.add_argument("--margins", default="0.5,1,2,4")
    parser.add_argument(
        "--skip", type=int, default=0, help="prompts left out at the beginning: those margins were learnt on"
    )
    parser.add_argument("--served", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer = open_model(given.checkpoint)
    found = gather_prompts(given.prompts, chat=has_chat_template(tokenizer), limit=given.skip + given.count)[
        given.skip :
    ]
    prompts = [encode_prompt(tokenizer, prompt) for prompt in found]
    runner = RowRunner(model, slots=1, room=max(map(len, prompts)) + given.tokens + 1)
    ends = ends_of(model, tokenizer)
    pairs = [tuple(pair.split(":")) for pair in given.pairs.split(",")]
    size = bytes_read(model, tuple({name for pair in pairs for name in pair}))
    rows = []
    answers = {
        high: [answered(runner, high, prompt, ends, given.tokens) for prompt in prompts]
        for high in dict.fromkeys(high for _, high in pairs if not given.served)
    }
    for low, high in pairs:
        for margin in map(float, given.margins.split(",")):
            if given.served:
                ways = Decoding(precision=low), Decoding(precision=low, gate=high, margin=margin)
                alone, seen = (
                    [served(runner, tokenizer, high, p, ends, given.tokens, way) for p in prompts] for way in ways
                )
            else:
                both = list(zip(prompts, answers[high], strict=True))
                alone = [watched(runner, low, low, *each, -1.0) for each in both]
                seen = [watched(runner, low, high, *each, margin) for each in both]
            rows.append({"low": low, "gate": high, "margin": margin, **judged(alone, seen, size[high] / size[low])})
            print(json.dumps(rows[-1]), flush=True)
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


def watched(
    runner: RowRunner, low: str, high: str, prompt: list[int], answer: list[int], margin: float
) -> tuple[Array, Array]:
    """Of every token of an answer: whether another is chosen, and whether it was gated."""
    flips, gated = [], []
    narrow, wide = runner.setting(low), runner.setting(high)
    runner.read([TokenRows(wide, 0, 0, prompt[:-1])], [0])
    text, since = [*prompt, *answer], len(prompt) - 1
    for at in range(len(prompt) - 1, len(text) - 1):
        logits_V = runner.read([TokenRows(narrow, 0, at, text[at : at + 1])], [1])[0][0]
        first, second = logits_V.topk(2).values.tolist()
        gated.append(first - second < margin)
        if gated[-1]:
            logits_V = runner.read([TokenRows(wide, 0, since, text[since : at + 1])], [1])[0][0]
            since = at + 1
        flips.append(int(logits_V.argmax()) != text[at + 1])
    return np.asarray(flips, dtype=np.float64), np.asarray(gated, dtype=np.float64)


def served(
    runner: RowRunner, tokenizer: Any, high: str, prompt: list[int], ends: frozenset[int], most: int, way: Decoding
) -> tuple[Array, Array]:
    """Of every token that the engine answers: whether the high width chooses another; and how many were gated, in the
    first place."""
    asked = Request(
        tokens=tuple(prompt), decoding=way, sampling=Sampling(temperature=0.0), max_tokens=most, ends=ends
    )  # fmt: skip
    engine = Engine(runner, tokenizer)
    answer = engine.submit(asked, lambda event: None)
    while engine.tick():
        pass
    chosen = answer.tokens[len(prompt) :]
    part = TokenRows(runner.setting(high), 0, 0, answer.tokens[:-1])
    [logits_TV] = runner.read([part], [len(chosen)])
    gated = np.zeros(len(chosen))
    gated[0] = answer.spent.gated
    return (logits_TV.argmax(-1).numpy() != np.asarray(chosen)).astype(np.float64), gated


def judged(alone: list[tuple[Array, Array]], seen: list[tuple[Array, Array]], ratio: float) -> dict[str, Any]:
    """The numbers of one margin. ratio: bytes of the gate's reading over the low width's."""
    counts_PC = np.asarray(
        [
            [len(flips), before.mean() * len(flips), flips.sum(), gated.sum()]
            for (before, _), (flips, gated) in zip(alone, seen, strict=True)
        ]
    )

    def told(counts_PC: Array) -> tuple[float, float]:
        tokens, before, after, gated = counts_PC.sum(0)
        return 1 - after / max(before, 1), gated / tokens * ratio

    draws = np.random.default_rng(0).integers(len(counts_PC), size=(RESAMPLES, len(counts_PC)))
    drawn = np.asarray([told(counts_PC[chosen]) for chosen in draws])
    (removed, extra), (tokens, before, after, gated) = told(counts_PC), counts_PC.sum(0).tolist()
    return {
        "tokens": int(tokens),
        "flips_alone": before / tokens,
        "flips": after / tokens,
        "gated": gated / tokens,
        "removed": removed,
        "removed_interval": np.percentile(drawn[:, 0], [2.5, 97.5]).tolist(),
        "extra_bytes": extra,
        "extra_interval": np.percentile(drawn[:, 1], [2.5, 97.5]).tolist(),
    }


if __name__ == "__main__":
    main()
