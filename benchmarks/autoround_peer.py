"""AutoRound on the same model, windows and evaluator as benchmarks/quality.py, for rows side by side.

Needs its own environment: pip install auto-round, with this project on the path.
Run:  PYTHONPATH=. python benchmarks/autoround_peer.py MODEL --bits 3 --calibration train.txt --text validation.txt
Columns must be a multiple of the group size (tinychat fits; stories260K needs its feed-forward padded).
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from auto_round import AutoRound
from torch.nn.functional import log_softmax

from polybit.compress.blocks import find_blocks
from polybit.data.text import read_windows
from polybit.hub.load import load_float
from polybit.hub.models import resolve
from polybit.nn.convert import targets


def main() -> None:
    """Quantize with AutoRound's defaults, symmetric, and print its KL and CPU seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--calibration", default="embedded")
    parser.add_argument("--text", default="embedded-test")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--amp", action="store_true", help="bfloat16 products")
    parser.add_argument("--blocks", type=int, help="quantize only so many blocks from the first on")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_float(resolve(args.model))
    reference = copy.deepcopy(model)
    calibration, _ = read_windows(args.calibration, tokenizer, args.window, count=args.samples, seed=0)
    held_out, _ = read_windows(args.text, tokenizer, args.window, count=args.windows)
    chosen = targets(model)
    path, _ = find_blocks(model, chosen)
    first = tuple(f"{path}.{index}." for index in range(args.blocks or 0))
    left = {target.name: {"bits": 16} for target in chosen if first and not target.name.startswith(first)}
    tool = AutoRound(
        model, tokenizer, bits=args.bits, layer_config=left, group_size=args.group_size, sym=True, iters=200,
        seqlen=args.window, nsamples=args.samples, batch_size=8, dataset=calibration.split(1), amp=args.amp,
        device_map="cpu", low_gpu_mem_usage=False, enable_torch_compile=False,
    )  # fmt: skip
    began = time.process_time()
    quantized, _ = tool.quantize()
    seconds = time.process_time() - began
    quantized = quantized.float()
    total = []
    with torch.no_grad():
        for ids_BT in held_out.split(8):
            wanted = log_softmax(reference(ids_BT).logits[:, :-1], -1)
            given = log_softmax(quantized(ids_BT).logits[:, :-1], -1)
            total.append((wanted.exp() * (wanted - given)).sum(-1).mean(1))
    kl_N = torch.cat(total)
    bits = args.bits + 16 / args.group_size
    error = float(kl_N.std()) / len(kl_N) ** 0.5
    print(f"| AutoRound | {args.bits} | {bits:.3f} | {kl_N.mean():.5f} ±{error:.5f} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
