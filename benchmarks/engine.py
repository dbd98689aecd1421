"""What the compiled search saves: seconds of every quantizer on matrices of real shapes, beside its twin in torch.

Every row is first checked: the compiled codes of the matrix's first rows must be the twin's in float64, all but one in
a thousand of them. Then both are timed in turn on the whole matrix, in the types and with the threads a run would use;
what is printed is the median of CPU seconds, and the ratio of the layer losses at every width. Weights and inputs are
drawn (seeded), inputs correlated.

    python benchmarks/engine.py [--shapes 1536x576 2048x2048] [--methods gptq nested] [--repeats 3] [--json OUT]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polybit.core.affine import Grid, QWeight
from polybit.core.records import LayerStats
from polybit.core.runtime import write_json
from polybit.kernels import search
from polybit.quant import problem
from polybit.quant.gptq import gptq
from polybit.quant.nested import nested
from polybit.quant.problem import layer_loss
from polybit.quant.rtn import rtn

METHODS: dict[str, Callable[[Tensor, LayerStats], QWeight]] = {
    "rtn": partial(rtn, grid=Grid(3, 64, "group")),
    "gptq, no descent": partial(gptq, grid=Grid(3, 64, "group"), descent_sweeps=0),
    "gptq": partial(gptq, grid=Grid(3, 64, "group")),
    "nested": partial(nested, grid=Grid(8, 64, "group")),
}
CHECKED = 48  # rows whose codes are compared with the twin's
ALIKE = 0.999


def drawn(rows: int, columns: int, tokens: int = 2048) -> tuple[Tensor, LayerStats]:
    """A Gaussian weight behind strongly correlated inputs."""
    draw = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(rows, columns, generator=draw)
    mixing_II = torch.eye(columns) + 3 * torch.randn(columns, columns, generator=draw) / columns**0.5
    x_TI = torch.randn(tokens, columns, generator=draw) @ mixing_II
    return weight_OI, LayerStats(x_TI.T @ x_TI / tokens, x_TI.abs().mean(0), tokens)


def run(method: str, weight_OI: Tensor, stats: LayerStats, isa: int | None) -> tuple[QWeight, float]:
    """Codes by one method, compiled or not (None), and the CPU seconds that took."""
    with search.using(isa):
        start = time.process_time()
        made = METHODS[method](weight_OI, stats)
        return made, time.process_time() - start


def equal_codes(method: str, weight_OI: Tensor, stats: LayerStats) -> float:
    """Share of codes on which twin and compiled agree in float64."""
    before, problem.SMALL = problem.SMALL, 1 << 40
    try:
        slow, fast = (run(method, weight_OI[:CHECKED], stats, isa)[0] for isa in (None, 0))
    finally:
        problem.SMALL = before
    return float((slow.codes_OI == fast.codes_OI).float().mean())


def row(method: str, shape: tuple[int, int], repeats: int, with_twin: bool) -> dict[str, Any]:
    """One row of the table."""
    weight_OI, stats = drawn(*shape)
    alike = equal_codes(method, weight_OI, stats)
    if alike < ALIKE:
        raise SystemExit(f"{method} on {shape}: only {alike:.4%} of the compiled codes are the twin's")
    seconds: dict[str, list[float]] = {"twin": [], "compiled": []}
    made = {}
    for _ in range(repeats):
        for name, isa in (("twin", None), ("compiled", 0)):
            if name == "compiled" or with_twin:
                made[name], spent = run(method, weight_OI, stats, isa)
                seconds[name].append(spent)
    found: dict[str, Any] = {"method": method, "rows": shape[0], "columns": shape[1], "equal_codes": alike}
    found |= {f"{name}_s": statistics.median(times) for name, times in seconds.items() if times}
    if with_twin:
        slow, fast = made["twin"], made["compiled"]
        widths = sorted({slow.bits, *slow.ratios}, reverse=True)
        found["loss_ratios"] = {
            b: layer_loss(weight_OI, fast, stats, b) / layer_loss(weight_OI, slow, stats, b) for b in widths
        }
    return found


def main() -> None:
    """Print one line per shape and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["576x576", "1536x576", "576x1536", "2048x2048"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-twin", action="store_true", help="time the compiled search alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not search.instruction_sets():
        raise SystemExit("the compiled search is not there: install polybit with a C++ compiler")
    print(f"{search.instruction_sets()[0]}, {torch.get_num_threads()} threads, median CPU seconds of {options.repeats}")
    print(f"{'method':18}{'shape':>12}{'twin':>9}{'compiled':>10}{'times':>7}{'equal':>9}  loss, compiled over twin")
    rows = []
    for shape in options.shapes:
        high, wide = (int(n) for n in shape.split("x"))
        for method in options.methods:
            found = row(method, (high, wide), options.repeats, not options.no_twin)
            rows.append(found)
            twin = found.get("twin_s")
            ratios = " ".join(f"{b}:{ratio:.3f}" for b, ratio in found.get("loss_ratios", {}).items())
            times = "" if twin is None else f"{twin / found['compiled_s']:.1f}"
            print(
                f"{method:18}{shape:>12}{'' if twin is None else f'{twin:.2f}':>9}{found['compiled_s']:>10.3f}"
                f"{times:>7}{found['equal_codes']:>9.4%}  {ratios}",
                flush=True,
            )
    if options.json:
        write_json(options.json, {"isa": search.instruction_sets()[0], "rows": rows})


if __name__ == "__main__":
    main()
