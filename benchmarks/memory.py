"""Peak memory and resume cost of quantizing, against depth: does it grow by more than the float model?

Run:  .venv/bin/python benchmarks/memory.py            (about two minutes; one process per depth)
Prints a Markdown row per depth: float model, peak above the loaded model, share of the time spent on keeping progress.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEPTHS = (2, 6, 12)


def one(depth: int) -> dict[str, float]:
    """Quantize a random Llama of `depth` blocks in this process: bytes and seconds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from polybit.compress.loop import compress_in_place
    from polybit.compress.recipe import Recipe
    from polybit.core.affine import Grid
    from polybit.hub.workspace import Workspace
    from polybit.nn.convert import targets

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1408, num_hidden_layers=depth, num_attention_heads=8
    )
    windows = list(torch.randint(0, 1000, (4, 4, 128)))
    # a first small run loads every library, so that the peak afterwards is the work's own
    small = LlamaForCausalLM(LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
                                         num_attention_heads=2)).eval()  # fmt: skip
    recipe = Recipe("gptq", Grid(4, 64, "group"), (4,), knobs={"descent_sweeps": 0})
    writing = 0.0

    class Timed(Workspace):
        def write(self, block, weights):
            nonlocal writing
            started = time.perf_counter()
            super().write(block, weights)
            writing += time.perf_counter() - started

    with tempfile.TemporaryDirectory() as folder:
        compress_in_place(small, targets(small), [w[:, :8] for w in windows], recipe, Workspace(Path(folder) / "s", {}))
        model = LlamaForCausalLM(config).eval()
        loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        writing, started = 0.0, time.perf_counter()
        compress_in_place(model, targets(model), windows, recipe, Timed(Path(folder) / "o", {"depth": depth}))
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    floats = 4 * sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    return {"depth": depth, "float": floats, "above": peak - loaded, "seconds": seconds, "writing": writing / seconds}


def main() -> None:
    """One process per depth, so that one peak does not hide another."""
    print("| blocks | float model, MB | peak above the loaded model, MB | seconds | keeping progress |")
    print("|---|---|---|---|---|")
    for depth in DEPTHS:
        done = subprocess.run([sys.executable, __file__, str(depth)], capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        print(f"| {depth} | {row['float'] / 1e6:.0f} | {row['above'] / 1e6:.0f} | {row['seconds']:.1f} "
              f"| {100 * row['writing']:.2f} % |")  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(one(int(sys.argv[1]))))
    else:
        main()
