"""Answers of `polybit pairs` against transformers' own batched generate: the same prompts, greedy, CPU seconds.

python benchmarks/pair_generation.py [--model tinychat] [--prompts 64] [--rounds 3]
"""

from __future__ import annotations

import argparse
import time

import torch

from polybit.data import synth
from polybit.data.chat import encode_prompt
from polybit.hub.lm import LocalLM
from polybit.hub.load import load_float
from polybit.hub.models import resolve


@torch.inference_mode()
def theirs(model, tokenizer, prompts: list[list[int]], *, max_tokens: int, batch: int) -> list[list[int]]:
    """transformers' generate over batches padded on the left, prompts in the given order."""
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    found = []
    for begin in range(0, len(prompts), batch):
        rows = prompts[begin : begin + batch]
        length = max(map(len, rows))
        ids_BT = torch.tensor([[fill] * (length - len(row)) + row for row in rows])
        mask_BT = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        out_BT = model.generate(
            ids_BT, attention_mask=mask_BT, max_new_tokens=max_tokens, do_sample=False, pad_token_id=fill
        )
        for tokens in out_BT[:, length:].tolist():
            stop = next((n + 1 for n, token in enumerate(tokens) if token in ends), len(tokens))
            found.append(tokens[:stop])
    return found


def main() -> None:
    """Alternate both and print CPU seconds and how many answers agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tinychat")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    model, tokenizer = load_float(resolve(args.model))
    talks = synth.conversations(args.prompts, 5, split="train")
    prompts = [encode_prompt(tokenizer, talk[:1]) for talk in talks]
    for number in range(args.rounds):
        lm = LocalLM(model, tokenizer, keep_decoded=False)
        begin = time.process_time()
        own = lm.generate_tokens(prompts, max_tokens=args.max_tokens)
        middle = time.process_time()
        peer = theirs(model, tokenizer, prompts, max_tokens=args.max_tokens, batch=args.batch)
        end = time.process_time()
        same = sum(a == b or [*a, *b[len(a) :]] == b for a, b in zip(own, peer, strict=True))
        print(f"round {number}: ours {middle - begin:.2f} s, generate {end - middle:.2f} s, ratio "
              f"{(end - middle) / (middle - begin):.2f}, same answers {same} of {len(prompts)}")  # fmt: skip


if __name__ == "__main__":
    main()
