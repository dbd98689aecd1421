"""What a quantized key/value cache costs and saves: bytes held, perplexity through the cache itself, time per token.

    python benchmarks/kv_cache.py MODEL TEXT [--windows 32] [--length 256] [--seeds 0,1,2] [--literal] [--json FILE]

MODEL is a float model (tinychat for the embedded one), so that weights add nothing; TEXT a file or a named set. Text is
read through the packed cache in blocks of keys, so that every token sees what it would see while decoding (--literal
reads token by token). Perplexity is compared with the float cache on the same windows; each seed reads other windows.
Bytes are those held at the end, over those of a bf16 cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polybit.core.plan import Plan
from polybit.data.text import read_windows
from polybit.evals.scoring import bootstrap
from polybit.hub.cache import PackedCache, cache_bytes
from polybit.hub.models import open_model
from polybit.nn.attention import arrange, ports, use_operands

BLOCK = 32  # tokens of a block of keys, and read at a time
SETTINGS = [
    ("float", "token", 64, 32),
    *[(f"k{k}v{v}", "channel", 64, 32) for k, v in ((8, 8), (8, 4), (4, 8), (4, 4), (4, 2), (2, 4))],
    ("k4v4", "channel", 64, 64),
    *[(f"k{k}v{v}", "token", 64, 32) for k, v in ((8, 4), (4, 8), (4, 4))],
]  # precision, how keys share scales, channels that share one, tokens that share one


@torch.inference_mode()
def read_through(model: Any, windows_NT: Tensor, portion: int) -> tuple[np.ndarray, float]:
    """(mean nats per token of each window, cache bytes over a bf16 cache's), read `portion` tokens at a time."""
    cache, total, steps = PackedCache(model), torch.zeros(len(windows_NT)), windows_NT.shape[1] - 1
    for start in range(0, steps, portion):
        stop = min(steps, start + portion)
        out = model(windows_NT[:, start:stop], past_key_values=cache, use_cache=True)
        logp_NTV = out.logits.float().log_softmax(-1)
        total -= logp_NTV.gather(2, windows_NT[:, start + 1 : stop + 1, None]).sum((1, 2))
    return (total / steps).numpy(), cache_bytes(cache) / bf16_bytes(model, len(windows_NT) * steps)


def bf16_bytes(model: Any, tokens: int) -> int:
    """Bytes of keys and values of so many tokens in bf16, from a float cache of one token."""
    precisions = {name: port.precision for name, port in ports(model).items()}
    use_operands(model, Plan())
    held = cache_bytes(model(torch.ones(1, 1, dtype=torch.int64), use_cache=True).past_key_values)
    for name, port in ports(model).items():
        port.precision = precisions[name]
    return held * 2 // next(model.parameters()).element_size() * tokens


@torch.inference_mode()
def step_ms(model: Any, ids_1T: Tensor, steps: int = 30) -> float:
    """Median milliseconds of a decoding step after a prompt."""
    cache, seconds = PackedCache(model), []
    model(ids_1T, past_key_values=cache, use_cache=True)
    for _ in range(steps):
        started = time.perf_counter()
        model(ids_1T[:, :1], past_key_values=cache, use_cache=True)
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--literal", action="store_true", help="read token by token, as decoding does")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, tokenizer = open_model(options.model)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    count = options.windows * len(seeds)
    windows, _ = read_windows(options.text, tokenizer, options.length, count=count)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    parts = windows[order].chunk(len(seeds))
    rows: list[dict[str, Any]] = []
    reference: list[np.ndarray] = []
    print("| cache | keys per | group | bytes of bf16 | perplexity | change (95 % interval) | by seed | ms per step |")
    print("|---|---|---|---|---|---|---|---|")
    for precision, keys, group, block in SETTINGS:
        use_operands(arrange(model, keys=keys, group=group, block=block), Plan.uniform(precision))
        nats, share = read_through(model, torch.cat(parts), 1 if options.literal else BLOCK)
        ms = step_ms(model, parts[0][:1, : options.length - 31])
        nll = np.split(nats, np.cumsum([len(part) for part in parts])[:-1])
        reference = reference or nll
        change = bootstrap(np.concatenate(nll), paired_with=np.concatenate(reference))
        by_seed = [float(np.exp((a - b).mean()) - 1) for a, b in zip(nll, reference, strict=True)]
        rows.append(
            {
                "precision": precision,
                "keys": keys,
                "group": block if keys == "channel" else group,
                "bytes_of_bf16": share,
                "perplexity": float(np.exp(np.concatenate(nll).mean())),
                "change": {name: float(np.expm1(getattr(change, name))) for name in ("value", "low", "high")},
                "by_seed": by_seed,
                "ms_per_step": ms,
            }
        )
        row = rows[-1]
        c = row["change"]
        print(
            f"| {precision} | {keys} | {row['group']} | {row['bytes_of_bf16']:.3f} | {row['perplexity']:.4f} | "
            f"{100 * c['value']:+.2f} % ({100 * c['low']:+.2f} to {100 * c['high']:+.2f}) | "
            f"{', '.join(f'{100 * s:+.2f}' for s in by_seed)} | {row['ms_per_step']:.1f} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({"model": options.model, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
