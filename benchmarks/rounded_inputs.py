"""What rounding the inputs of every product costs: KL in nats from the same model with exact products.

    python benchmarks/rounded_inputs.py tinychat --text embedded-test
    python benchmarks/rounded_inputs.py stories260K --text tinystories_val.txt

The model is rounded to nearest once per width. The same windows are then read with exact products, and with inputs
rounded to 16 and to 8 bits.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from polybit.core.affine import Grid
from polybit.core.planes import pack
from polybit.data.text import read_windows
from polybit.hub.models import open_model
from polybit.nn.convert import convert, targets
from polybit.nn.switch import multiply_by
from polybit.quant.rtn import rtn

WIDTHS = (8, 4, 3, 2)


@torch.inference_mode()
def log_probabilities(model: nn.Module, windows_NT: Tensor) -> Tensor:
    """float64 [N, T, V], a window at a time."""
    return torch.cat([model(row[None]).logits.double().log_softmax(-1) for row in windows_NT])


def kl(reference_NTV: Tensor, other_NTV: Tensor) -> float:
    """Mean KL(reference ‖ other) per token in nats."""
    return float((reference_NTV.exp() * (reference_NTV - other_NTV)).sum(-1).mean())


def rounded(model: nn.Module, bits: int, group_size: int) -> nn.Module:
    """A copy with every linear layer of the blocks rounded to nearest."""
    grid = Grid(bits, group_size, "group")
    planes = {t.name: pack(rtn(t.weight_OI(model), None, grid)) for t in targets(model)}
    return convert(copy.deepcopy(model), planes)


def main() -> None:
    """Print a row per width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True, help="a file or a named set")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, tokenizer = open_model(args.model)
    windows_NT, _ = read_windows(args.text, tokenizer, args.length, count=args.windows)
    reference_NTV = log_probabilities(model, windows_NT)
    rows = []
    for bits in WIDTHS:
        now = rounded(model, bits, args.group_size)
        exact_NTV = log_probabilities(multiply_by(now, "float"), windows_NT)
        row = {"width": f"w{bits}", "kl": kl(reference_NTV, exact_NTV)}
        for arithmetic in ("int16", "int8"):
            row[arithmetic] = kl(exact_NTV, log_probabilities(multiply_by(now, arithmetic), windows_NT))
        rows.append(row)
        print(" ".join(f"{value:.3g}" if isinstance(value, float) else value for value in row.values()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
