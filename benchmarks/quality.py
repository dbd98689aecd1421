"""Quality per bit of every method on one model: KL, perplexity, agreement, CPU seconds; a Markdown table and JSON rows.

    python benchmarks/quality.py MODEL --calibration train.txt --text validation.txt \
        --rows rtn:4:32a gptq:3:32s block:3:32s finish:3:32s nested:8,6,5,4,3,2:32a --json rows.json

A row is method:bits:group, `s` symmetric or `a` with a zero point per group. Methods: all of the table of quantizers by
their layer-wise codes; NAME-block and NAME-finish go on with learned rounding block by block or of the whole model
(block and finish alone: of the default method of one width).
Protocol: one token stream cut into windows of BOS + 255 tokens; calibration 128 windows
drawn with seed 0; evaluation on the first 392 windows of the other text. KL(float || quantized) in nats per token with
its standard error over windows. Quantized: every linear layer of the decoder blocks. CPU seconds cover everything from
the loaded float model and the token windows to the codes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from polybit.compress.blocks import Whole, find_blocks, outside
from polybit.compress.loop import compress
from polybit.compress.recipe import Recipe
from polybit.core.affine import Grid, QWeight
from polybit.core.records import machine
from polybit.core.runtime import write_json
from polybit.data.text import read_windows
from polybit.hub.load import load_float
from polybit.hub.models import resolve
from polybit.nn.convert import Target, targets
from polybit.quant.table import DEFAULT_FIXED, QUANTIZERS

WINDOW, CALIBRATION, EVALUATION = 256, 128, 392
ENDINGS = ("block", "finish")  # learned rounding per block, or of the whole model, after the method's own codes


@dataclass
class Row:
    """One quantized model at one width, and what was measured."""

    name: str
    width: int | None
    codes: Mapping[str, QWeight]
    seconds: float
    numbers: dict[str, float] = field(default_factory=dict)


def recipe_of(text: str) -> Recipe:
    """Read `finish:3:32s`."""
    spelled, bits, group = text.split(":")
    method, ending = ending_of(spelled)
    learned = QUANTIZERS[method].learned
    if ending and learned is None:
        raise SystemExit(
            f"{method} has no learned steps: {', '.join(n for n, q in QUANTIZERS.items() if q.learned)} do"
        )
    widths = tuple(int(b) for b in bits.split(","))
    zero = {"s": "centre", "a": "group"}[group[-1]]
    grid = Grid(max(widths), int(group[:-1]), zero)  # type: ignore[arg-type]
    block_steps = learned.block_steps if learned and ending == "block" else 0
    finish_steps = learned.steps if learned and ending == "finish" else 0
    return Recipe(method, grid, widths, block_steps, finish_steps)


def ending_of(spelled: str) -> tuple[str, str]:
    """(method, ending) of `gptq`, `nested-finish`, or `finish` alone, which means the default fixed method's."""
    if spelled in ENDINGS:
        return DEFAULT_FIXED, spelled
    method, _, ending = spelled.rpartition("-")
    return (method, ending) if ending in ENDINGS else (spelled, "")


def quantize(model: torch.nn.Module, chosen: list[Target], batches: list[Tensor], text: str) -> list[Row]:
    """The rows of one specification: one per width."""
    recipe = recipe_of(text)
    began = time.process_time()
    codes: dict[str, QWeight] = {}
    for part in compress(model, chosen, batches, recipe):
        codes |= part
    seconds = time.process_time() - began
    several = len(recipe.widths) > 1
    return [Row(text, width if several else None, codes, seconds) for width in recipe.widths]


@torch.no_grad()
def evaluate(model: torch.nn.Module, chosen: list[Target], rows: list[Row], windows_NT: Tensor, batch: int) -> float:
    """Fill in the rows' numbers; returns the float model's mean nats per token."""
    whole = Whole(model, tuple(chosen))
    sums: list[dict[str, list[Tensor]]] = [{"kl": [], "nll": [], "same": []} for _ in rows]
    float_nll = []
    for ids_BT in windows_NT.split(batch):
        logits_BTV = whole.forward({}, ids_BT)[:, :-1]
        log_BTV = log_softmax(logits_BTV, -1)
        float_nll.append(nll(logits_BTV, ids_BT))
        for row, sums_of in zip(rows, sums, strict=True):
            dense = {name: q.dequantize(row.width) for name, q in row.codes.items()}
            given_BTV = whole.forward(dense, ids_BT)[:, :-1]
            sums_of["kl"].append((log_BTV.exp() * (log_BTV - log_softmax(given_BTV, -1))).sum(-1).mean(1))
            sums_of["nll"].append(nll(given_BTV, ids_BT))
            sums_of["same"].append((given_BTV.argmax(-1) == log_BTV.argmax(-1)).float().mean(1))
    float_N = torch.cat(float_nll)
    for row, sums_of in zip(rows, sums, strict=True):
        kl_N, nll_N, same_N = (torch.cat(sums_of[key]) for key in ("kl", "nll", "same"))
        row.numbers = {
            "bits_per_weight": bits_per_weight(row.codes),
            "perplexity": math.exp(float(nll_N.mean())),
            "delta_nll": float((nll_N - float_N).mean()),
            "kl": float(kl_N.mean()),
            "kl_error": float(kl_N.std() / len(kl_N) ** 0.5),
            "top1": float(same_N.mean()),
            "cpu_seconds": row.seconds,
        }
    return float(float_N.mean())


def nll(logits_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    """Mean nats per token of each window."""
    return cross_entropy(logits_BTV.transpose(1, 2), ids_BT[:, 1:], reduction="none").mean(1)


def bits_per_weight(codes: Mapping[str, QWeight]) -> float:
    """Codes, scales, zero points and ratios over the quantized weights."""
    count = {name: q.codes_OI.numel() for name, q in codes.items()}
    return sum(q.bits_per_weight() * count[name] for name, q in codes.items()) / sum(count.values())


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = ["| run | width | bpw | ppl | ΔNLL | KL | top-1 | CPU s |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        n = row.numbers
        width = "all" if row.width is None else str(row.width)
        lines.append(
            f"| {row.name} | {width} | {n['bits_per_weight']:.3f} | {n['perplexity']:.3f} | {n['delta_nll']:.4f} | "
            f"{n['kl']:.5f} ±{n['kl_error']:.5f} | {100 * n['top1']:.2f} % | {n['cpu_seconds']:.1f} |"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--window", type=int, default=WINDOW)
    parser.add_argument("--windows", type=int, default=EVALUATION, help="evaluation windows")
    parser.add_argument("--blocks", type=int, help="quantize only so many blocks from the first on")
    parser.add_argument("--calibration-windows", type=int, default=CALIBRATION)
    parser.add_argument("--batch", type=int, default=4, help="windows per calibration batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Quantize, evaluate, print."""
    args = arguments()
    torch.set_num_threads(args.threads)
    model, tokenizer = load_float(resolve(args.model))
    draw, _ = read_windows(args.calibration, tokenizer, args.window, count=args.calibration_windows, seed=0)
    held_out, _ = read_windows(args.text, tokenizer, args.window, count=args.windows)
    everything = targets(model)
    outer = {target.name for target in outside(model, everything)}
    chosen = [target for target in everything if target.name not in outer]
    if args.blocks is not None:
        path, _ = find_blocks(model, chosen)
        first = tuple(f"{path}.{index}." for index in range(args.blocks))
        chosen = [target for target in chosen if target.name.startswith(first)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    rows = [row for text in args.rows for row in quantize(model, chosen, list(draw.split(args.batch)), text)]
    float_nats = evaluate(model, chosen, rows, held_out, 8)
    print(f"float perplexity {math.exp(float_nats):.4f}\n\n{table(rows)}")
    if args.json:
        found: list[dict[str, Any]] = [{"run": row.name, "width": row.width, **row.numbers} for row in rows]
        config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        write_json(args.json, json.loads(json.dumps({"config": config, "machine": machine(), "rows": found})))


if __name__ == "__main__":
    main()
