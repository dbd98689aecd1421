"""What one nested file costs: KL at every width against models quantized for that width alone, and bytes.

For each width: KL(float || quantized) in nats per token of the nested file, of classic symmetric GPTQ (no descent, no
refit), and of the best layer-wise model of that width (GPTQ with zero point or symmetric, refit and descent), and the
two ratios. All methods see the same Hessians of the float model: 64 windows of 256 tokens; KL over 128 other windows.
Ends with the bytes of the file over those of its largest width alone. Rows are printed and written as JSON.

    python benchmarks/nested.py --model DIR --calibration FILE --text FILE [--group-size 32 64] [--json OUT]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polybit.compress.stats import collect
from polybit.core.affine import Grid, QWeight
from polybit.core.records import LayerStats
from polybit.core.runtime import write_json
from polybit.data.text import read_windows
from polybit.hub.load import load_float
from polybit.nn.convert import targets
from polybit.quant.gptq import gptq
from polybit.quant.nested import WIDTHS, nested
from polybit.quant.problem import layer_loss

Method = Callable[[Tensor, LayerStats], QWeight]


class Bench:
    """A float model, its layers' statistics, and its predictions on the evaluation windows."""

    def __init__(self, model: nn.Module, calibration_NT: Tensor, text_NT: Tensor, batch: int = 16) -> None:
        self.model = model.requires_grad_(False)
        self.targets = targets(model)
        self.stats = collect(model, list(calibration_NT.split(batch)), self.targets)
        self.weights = {t.name: t.weight_OI(model).clone() for t in self.targets}
        self.batches = list(text_NT.split(batch))
        self.logp = [self.log_probabilities(ids_BT) for ids_BT in self.batches]

    def log_probabilities(self, ids_BT: Tensor) -> Tensor:
        """Log-probabilities of the model as it is now."""
        return torch.log_softmax(self.model(input_ids=ids_BT).logits.float(), -1)

    def quantize(self, method: Method) -> tuple[dict[str, QWeight], float]:
        """Every layer by one method, and the CPU seconds it took."""
        start = time.process_time()
        made = {name: method(weight_OI, self.stats[name]) for name, weight_OI in self.weights.items()}
        return made, time.process_time() - start

    def kl(self, made: dict[str, QWeight], width: int | None = None) -> float:
        """Mean KL(float || quantized), nats per token."""
        self.place({name: q.dequantize(width) for name, q in made.items()})
        total, tokens = 0.0, 0
        for ids_BT, logp_BTV in zip(self.batches, self.logp, strict=True):
            gap_BTV = logp_BTV - self.log_probabilities(ids_BT)
            total += float((logp_BTV.exp() * gap_BTV).sum(-1).double().sum())
            tokens += ids_BT.numel()
        self.place(self.weights)
        return total / tokens

    def place(self, weights: dict[str, Tensor]) -> None:
        """Put these matrices into the model."""
        for target in self.targets:
            parameter, weight_OI = target.parameter(self.model), weights[target.name]
            parameter.data.copy_((weight_OI.T if target.kind == "conv1d" else weight_OI).reshape(parameter.shape))

    def mean_loss(self, made: dict[str, QWeight], width: int | None, alone: dict[str, float]) -> float:
        """Mean over layers of the layer loss over that of the model made for this width."""
        ratios = [layer_loss(self.weights[n], q, self.stats[n], width) / alone[n] for n, q in made.items()]
        return sum(ratios) / len(ratios)

    def bits(self, bits_of: Callable[[str], float]) -> float:
        """Mean over weights of a layer's bits per weight."""
        sizes = {name: weight_OI.numel() for name, weight_OI in self.weights.items()}
        return sum(bits_of(name) * size for name, size in sizes.items()) / sum(sizes.values())


def alone_rows(bench: Bench, size: int) -> dict[int, dict[str, Any]]:
    """Models made for one width each: classic symmetric GPTQ and the best layer-wise one."""
    rows: dict[int, dict[str, Any]] = {}
    for width in WIDTHS:
        plain, _ = bench.quantize(
            lambda w, s, b=width: gptq(w, s, Grid(b, size, "centre"), descent_sweeps=0)  # type: ignore[misc]
        )
        candidates = {
            zero: bench.kl(bench.quantize(lambda w, s, b=width, z=zero: gptq(w, s, Grid(b, size, z)))[0])  # type: ignore[misc]
            for zero in ("centre", "group")
        }
        losses = {name: layer_loss(bench.weights[name], q, bench.stats[name]) for name, q in plain.items()}
        rows[width] = {"symmetric_gptq": bench.kl(plain), "best_alone": min(candidates.values()), "losses": losses}
    return rows


def nested_rows(bench: Bench, size: int, alone: dict[int, dict[str, Any]], **knobs: Any) -> list[dict[str, Any]]:
    """One row per width of one nested file."""
    grid = Grid(max(WIDTHS), size, "group")
    made, seconds = bench.quantize(lambda w, s: nested(w, s, grid, **knobs))
    file_bits = bench.bits(lambda name: made[name].bits_per_weight())
    widest_bits = bench.bits(lambda name: grid.bits_per_weight(*bench.weights[name].shape))
    rows = []
    for width in WIDTHS:
        kl = bench.kl(made, width)
        reference = alone[width]
        rows.append(
            {
                "group_size": size,
                "width": width,
                "kl_nats_per_token": kl,
                "symmetric_gptq": reference["symmetric_gptq"],
                "ratio_to_symmetric": kl / reference["symmetric_gptq"],
                "best_alone": reference["best_alone"],
                "ratio_to_best": kl / reference["best_alone"],
                "layer_loss_ratio": bench.mean_loss(made, width, reference["losses"]),
                "bytes_ratio": file_bits / widest_bits,
                "cpu_seconds": seconds,
            }
        )
    return rows


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    print(
        f"g{row['group_size']:<4} w{row['width']}  KL {row['kl_nats_per_token']:.4g}"
        f"  symmetric {row['symmetric_gptq']:.4g} x{row['ratio_to_symmetric']:.2f}"
        f"  best {row['best_alone']:.4g} x{row['ratio_to_best']:.2f}  layers x{row['layer_loss_ratio']:.2f}"
        f"  bytes x{row['bytes_ratio']:.3f}  {row['cpu_seconds']:.0f} s",
        flush=True,
    )


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", default="embedded")
    parser.add_argument("--text", default="embedded-test")
    parser.add_argument("--group-size", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_float(options.model)
    calibration_NT, _ = read_windows(options.calibration, tokenizer, 256, count=64)
    text_NT, _ = read_windows(options.text, tokenizer, 256, count=128)
    bench = Bench(model, calibration_NT, text_NT)
    rows = []
    for size in options.group_size:
        for row in nested_rows(bench, size, alone_rows(bench, size)):
            show(row)
            rows.append(row)
    if options.json:
        write_json(options.json, {"model": Path(options.model).name, "rows": rows})


if __name__ == "__main__":
    with torch.inference_mode():
        main()
