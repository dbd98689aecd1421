"""What share of a request's CPU seconds a fitted router takes.

    python benchmarks/router_cost.py DIR --prompts FILE --count 20 --tokens 64 --json cost.json

DIR holds a router (polybit route). Each prompt gets the width the router chooses, and is answered greedily at it, up to
so many tokens, by the engine that serves it, one at a time. Intervals (95 %) resample prompts.
"""

from __future__ import annotations

import argparse
import json
import threading
from collections import Counter
from pathlib import Path
from time import process_time

import numpy as np

from polybit.core.records import machine
from polybit.data.chat import encode_prompt
from polybit.data.prompts import gather_prompts
from polybit.data.text import has_chat_template
from polybit.serve.loading import load_service
from polybit.serve.request import Decoding, Done, Request, Sampling

RESAMPLES = 1000


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    service = load_service(given.checkpoint, slots=1, threads=1, context=1024)
    if service.policy.needs is None:
        raise SystemExit(f"{given.checkpoint} has no router: fit one with polybit route")
    tokenizer = service.tokenizer
    found = gather_prompts(given.prompts, chat=has_chat_template(tokenizer), limit=given.count + 1)
    seconds, widths, answered = [], Counter[str](), 0
    for number, prompt in enumerate(encode_prompt(tokenizer, prompt) for prompt in found):
        began = process_time()
        choice = service.policy.choose(prompt, 0.0)
        routed = process_time()
        asked = Request(
            tokens=tuple(prompt),
            decoding=Decoding(precision=choice.precision),
            sampling=Sampling(temperature=0.0),
            max_tokens=given.tokens,
            ends=service.ends,
        )
        over = threading.Event()
        answer = service.engine.submit(asked, lambda event, over=over: over.set() if isinstance(event, Done) else None)
        over.wait()
        if number:  # the first makes what the others find
            seconds.append((routed - began, process_time() - began))
            widths[choice.precision] += 1
            answered += answer.count
    service.engine.close()
    service.templates.close()
    router, whole = np.asarray(seconds).T
    draws = np.random.default_rng(0).integers(len(router), size=(RESAMPLES, len(router)))
    low, high = np.percentile(router[draws].sum(1) / whole[draws].sum(1), [2.5, 97.5])
    row = {
        "prompts": len(router),
        "tokens": answered,
        "widths": dict(widths),
        "router_ms": 1e3 * float(router.mean()),
        "request_ms": 1e3 * float(whole.mean()),
        "share": {"value": float(router.sum() / whole.sum()), "low": float(low), "high": float(high)},
    }
    print(json.dumps(row))
    if given.json is not None:
        given.json.write_text(json.dumps({"machine": machine(), "config": vars(given) | {"json": ""}, "rows": [row]}))


if __name__ == "__main__":
    main()
