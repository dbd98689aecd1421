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

from polybit.data.text import read_windows
from polybit.hub.load import load_float
from polybit.hub.models import resolve


def main() -> None:
    """Quantize with AutoRound's defaults, symmetric, and print its KL and CPU seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--calibration", default="embedded")
    parser.add_argument("--text", default="embedded-test")
    parser.add_argument("--windows", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_float(resolve(args.model))
    reference = copy.deepcopy(model)
    calibration, _ = read_windows(args.calibration, tokenizer, 256, count=128, seed=0)
    held_out, _ = read_windows(args.text, tokenizer, 256, count=args.windows)
    tool = AutoRound(
        model, tokenizer, bits=args.bits, group_size=args.group_size, sym=True, iters=200, seqlen=256, nsamples=128,
        batch_size=8, dataset=calibration.split(1), amp=False, device_map="cpu", low_gpu_mem_usage=False,
        enable_torch_compile=False,
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
