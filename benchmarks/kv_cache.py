"""What a quantized key/value cache costs and saves: bytes held, perplexity through the cache itself, time per token.

    python benchmarks/kv_cache.py MODEL TEXT [--windows 32] [--length 256] [--seeds 0,1,2] [--json FILE]

MODEL is a float model (tinychat for the embedded one), so that weights add nothing; TEXT a file or a named set. Text is
read token by token through the packed cache, as generation does. Perplexity is compared with the float cache on the
same windows; each seed reads other windows. Bytes are those held at the end, over those of a bf16 cache.
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

from polybit.commands.models import open_model
from polybit.core.plan import Plan
from polybit.data.text import read_windows
from polybit.evals.scoring import bootstrap
from polybit.hub.cache import PackedCache, cache_bytes
from polybit.nn.attention import arrange, use_operands

SETTINGS = [
    ("float", "token", 64, 32),
    *[(f"k{k}v{v}", "channel", 64, 32) for k, v in ((8, 8), (8, 4), (4, 8), (4, 4), (4, 2), (2, 4))],
    ("k4v4", "channel", 64, 64),
    *[(f"k{k}v{v}", "token", 64, 32) for k, v in ((8, 4), (4, 8), (4, 4))],
]  # precision, how keys share scales, channels that share one, tokens that share one


@torch.inference_mode()
def read_through(model: Any, windows_NT: Tensor) -> tuple[np.ndarray, float, float]:
    """(mean nats per token of each window, cache bytes over a bf16 cache's, median ms of a step of the batch)."""
    cache, total, seconds = PackedCache(model), torch.zeros(len(windows_NT)), []
    for token in range(windows_NT.shape[1] - 1):
        started = time.perf_counter()
        out = model(windows_NT[:, token : token + 1], past_key_values=cache, use_cache=True)
        seconds.append(time.perf_counter() - started)
        logp_NV = out.logits[:, -1].float().log_softmax(-1)
        total -= logp_NV.gather(1, windows_NT[:, token + 1 : token + 2])[:, 0]
    steps = windows_NT.shape[1] - 1
    config = model.config.get_text_config()
    heads = (
        getattr(config, "num_key_value_heads", None) or getattr(config, "num_heads", None) or config.num_attention_heads
    )
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    plain = 2 * 2 * len(cache.layers) * len(windows_NT) * steps * heads * size
    return (total / steps).numpy(), cache_bytes(cache) / plain, 1000 * statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seeds", default="0,1,2")
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
        nats, share, ms = read_through(model, torch.cat(parts))
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
