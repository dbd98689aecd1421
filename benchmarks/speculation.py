"""Drafts from the text so far and from a model's own narrow widths: tokens per (CPU) second, acceptance.

    python benchmarks/speculation.py DIR --prompts FILE --high w8 --draft w3,w4 --drafts 3 --lookup 2

One stream, greedy, every setting in turn within a round; ratios are formed within rounds. The answer of every setting
must be the plain one, token by token, or the run stops. Gates: benchmarks/gates.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from polybit.core.records import machine
from polybit.data.chat import encode_prompt
from polybit.data.prompts import gather_prompts
from polybit.data.text import has_chat_template
from polybit.hub.models import open_model
from polybit.serve.engine import Engine
from polybit.serve.loading import ends_of
from polybit.serve.request import Decoding, Request, Sampling
from polybit.serve.runners import RowRunner


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--high", default="w8")
    parser.add_argument("--draft", default="w3,w4")
    parser.add_argument("--drafts", default="3")
    parser.add_argument("--lookup", default="2")
    parser.add_argument("--wall", action="store_true", help="seconds of an idle machine instead of CPU seconds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    model, tokenizer = open_model(given.checkpoint)
    bench = Bench(model, tokenizer, given)
    rows = bench.rows()
    for row in rows:
        print(json.dumps(row))
    if given.json is not None:
        given.json.write_text(
            json.dumps({"machine": machine(), "config": vars(given) | {"json": ""}, "rows": rows}, indent=1)
        )


class Bench:
    """A model, prompts as tokens, and the settings to compare."""

    def __init__(self, model: Any, tokenizer: Any, given: argparse.Namespace) -> None:
        chat = has_chat_template(tokenizer)
        prompts = gather_prompts(given.prompts, chat=chat, limit=given.count)
        self.prompts = [tuple(encode_prompt(tokenizer, prompt)) for prompt in prompts]
        room = max(len(prompt) for prompt in self.prompts) + given.tokens + 24
        self.given, self.tokenizer = given, tokenizer
        self.clock = perf_counter if given.wall else process_time
        self.runner = RowRunner(model, slots=1, room=room)
        self.ends = ends_of(model, tokenizer)

    def settings(self) -> dict[str, Decoding]:
        """Everything that is compared, the plain high width first."""
        g = self.given
        found = {g.high: Decoding(precision=g.high)}
        lookups = list(map(int, g.lookup.split(",")))
        for lookup in filter(None, lookups):
            found[f"{g.high}, lookup {lookup}"] = Decoding(precision=g.high, lookup=lookup)
        for draft, count, lookup in product(g.draft.split(","), g.drafts.split(","), lookups):
            more = f", lookup {lookup}" if lookup else ""
            found[f"{g.high}, up to {count} drafts of {draft}{more}"] = Decoding(
                precision=g.high, draft=draft, drafts=int(count), lookup=lookup
            )
        return found

    def answer(self, decoding: Decoding) -> tuple[float, list[list[int]], list[Any]]:
        """Seconds of the answers without their prompts, the answers, what they took."""
        engine = Engine(self.runner, self.tokenizer)
        seconds, answers, spents = 0.0, [], []
        for prompt in self.prompts:
            asked = Request(
                tokens=prompt, decoding=decoding, sampling=Sampling(temperature=0.0), max_tokens=self.given.tokens,
                ends=self.ends,
            )  # fmt: skip
            answer = engine.submit(asked, lambda event: None)
            while not answer.answering and engine.tick():
                pass
            began = self.clock()
            while engine.tick():
                pass
            seconds += self.clock() - began
            answers.append(answer.tokens[len(prompt) :])
            spents.append(answer.spent)
        return seconds, answers, spents

    def rows(self) -> list[dict[str, Any]]:
        """One row per setting."""
        settings = self.settings()
        rates: dict[str, list[float]] = {name: [] for name in settings}
        seen: dict[str, tuple[list[list[int]], list[Any]]] = {}
        for _ in range(self.given.rounds):
            for name, decoding in settings.items():
                seconds, answers, spents = self.answer(decoding)
                rates[name].append(sum(map(len, answers)) / seconds)
                seen[name] = answers, spents
        plain = seen[self.given.high][0]
        return [self.row(name, decoding, rates, *seen[name], plain) for name, decoding in settings.items()]

    def row(
        self, name: str, decoding: Decoding, rates: dict[str, list[float]], answers: Sequence[Sequence[int]],
        spents: Sequence[Any], plain: Sequence[Sequence[int]],
    ) -> dict[str, Any]:  # fmt: skip
        """The numbers of one setting."""
        if answers != plain:
            raise SystemExit(f"{name}: drafts changed an answer")
        ratio = statistics.median(a / b for a, b in zip(rates[name], rates[self.given.high], strict=True))
        row: dict[str, Any] = {
            "setting": name, "tokens_per_second": statistics.median(rates[name]), "against_high": ratio,
            "least": min(a / b for a, b in zip(rates[name], rates[self.given.high], strict=True)),
            "rounds": [a / b for a, b in zip(rates[name], rates[self.given.high], strict=True)],
            "answers": len(plain), "tokens": sum(map(len, plain)),
        }  # fmt: skip
        if decoding.drafted:
            drafted = sum(spent.drafted for spent in spents)
            row["accepted"] = sum(sum(spent.accepted) for spent in spents) / max(drafted, 1)
            row["drafted_per_token"] = drafted / row["tokens"]
        return row


if __name__ == "__main__":
    main()
