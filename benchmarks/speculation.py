"""Drafts from a model's own narrow widths, and gates: tokens per second, acceptance, flips, bytes per token.

    python benchmarks/speculation.py DIR --prompts FILE --high w8 --draft w2,w3,w4 --drafts 2,4 --json rows.json

One stream, greedy, every setting in turn within a round; ratios are formed within rounds. The answer of every setting
with drafts must be the plain one, token by token, or the run stops.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from polybit.core.records import machine
from polybit.data.chat import encode_prompt
from polybit.data.prompts import gather_prompts
from polybit.data.text import has_chat_template
from polybit.hub.models import open_model
from polybit.serve.engine import Engine
from polybit.serve.loading import bytes_read, ends_of
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
    parser.add_argument("--draft", default="w2,w3,w4")
    parser.add_argument("--drafts", default="2,4")
    parser.add_argument("--gate-low", default="w4")
    parser.add_argument("--margins", default="0.5,1,2")
    parser.add_argument("--threads", type=int, default=2)
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
        self.runner = RowRunner(model, slots=1, room=room)
        self.ends = ends_of(model, tokenizer)
        self.bytes = bytes_read(model, tuple({given.high, given.gate_low}))

    def settings(self) -> dict[str, Decoding]:
        """Everything that is compared, the plain high width first."""
        g = self.given
        found = {g.high: Decoding(precision=g.high), g.gate_low: Decoding(precision=g.gate_low)}
        for draft in g.draft.split(","):
            for count in map(int, g.drafts.split(",")):
                found[f"{g.high}, {count} drafts of {draft}"] = Decoding(precision=g.high, draft=draft, drafts=count)
        for margin in map(float, g.margins.split(",")):
            name = f"{g.gate_low}, leads below {margin:g} at {g.high}"
            found[name] = Decoding(precision=g.gate_low, gate=g.high, margin=margin)
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
            began = perf_counter()
            while engine.tick():
                pass
            seconds += perf_counter() - began
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
        g = self.given
        if decoding.draft is not None and answers != plain:
            raise SystemExit(f"{name}: drafts changed an answer")
        ratio = statistics.median(a / b for a, b in zip(rates[name], rates[g.high], strict=True))
        row: dict[str, Any] = {
            "setting": name, "tokens_per_second": statistics.median(rates[name]), "against_high": ratio,
            "same_answers": sum(a == b for a, b in zip(answers, plain, strict=True)), "answers": len(plain),
        }  # fmt: skip
        tokens = sum(map(len, answers))
        if decoding.draft is not None:
            drafted = sum(spent.drafted for spent in spents)
            row["accepted"] = sum(sum(spent.accepted) for spent in spents) / max(drafted, 1)
        if decoding.gate is not None:
            gated = sum(spent.gated for spent in spents) / max(tokens, 1)
            low, high = self.bytes[decoding.precision], self.bytes[decoding.gate]
            row |= {"gated": gated, "extra_bytes": gated * high / low, "flips": self.flips(decoding, plain)}
        elif decoding.draft is None:
            row["flips"] = self.flips(decoding, plain)
        return row

    def flips(self, decoding: Decoding, plain: Sequence[Sequence[int]]) -> float:
        """Share of the high width's own answer tokens that this setting decides otherwise, each after the same text."""
        wrong = total = 0
        for prompt, answer in zip(self.prompts, plain, strict=True):
            for at in range(1, len(answer)):
                tokens = [*prompt, *answer[:at]]
                logits = self.runner.read([self.part(decoding.precision, tokens, at)], [1])[0][0]
                first, second = logits.topk(2).values.tolist()
                if decoding.gate is not None and first - second < decoding.margin:
                    logits = self.runner.read([self.part(decoding.gate, tokens, at, last=True)], [1])[0][0]
                wrong += int(logits.argmax()) != answer[at]
                total += 1
        return wrong / max(total, 1)

    def part(self, precision: str, tokens: Sequence[int], at: int, *, last: bool = False) -> Any:
        """The rows that are new at this place: the whole prompt first, then a token at a time."""
        from polybit.hub.rows import TokenRows

        start = 0 if at == 1 and not last else len(tokens) - 1
        return TokenRows(self.runner.setting(precision), 0, start, tokens[start:])


if __name__ == "__main__":
    main()
