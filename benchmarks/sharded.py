"""Memory of one process that trains alone, and of each of two under FSDP2.

    python -m benchmarks.sharded --json FILE

A random Llama behind fake quantization takes a few steps. Counted are the bytes of weights, gradients and moments that
a process holds after a step, and the growth of its resident memory from before the model to its peak while training.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPE = {"hidden": 512, "layers": 8, "intermediate": 1408, "vocabulary": 2048, "heads": 8, "kv_heads": 4}
STEPS, ROWS, LENGTH = 2, 4, 16


def main() -> None:
    """Both runs, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--told", type=Path, default=None, help="one process of a run, told in a file")
    args = parser.parse_args()
    if args.told is not None:
        run(args.told)
        return
    rows = []
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if processes == 2 else []
            words = [*start, "-m", "benchmarks.sharded", "--told", f"{folder}/told"]
            subprocess.run([sys.executable, *words], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            rows.append({"processes": processes, **json.loads(Path(f"{folder}/told").read_text(encoding="utf-8"))})
    for row in rows:
        row["share"] = round(row["state_mb"] / rows[0]["state_mb"], 3)
        row["peak_share"] = round(row["peak_mb"] / rows[0]["peak_mb"], 3)
    print(json.dumps(rows, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def run(told: Path) -> None:
    """A few steps as one process of however many there are."""
    import torch

    from polybit.core.memory import return_large
    from polybit.core.plan import Plan
    from polybit.hub.random_model import Shape, random_float
    from polybit.train import fit, world
    from polybit.train.fit import Course, Teaching
    from polybit.train.latent import make_trainable
    from polybit.train.sharded import local_bytes

    return_large()
    torch.set_num_threads(1)
    seen = {"peak": 0}
    plain = fit.PrecisionTrainer.training_step

    def step(self, *given, **named):  # type: ignore[no-untyped-def]
        if not seen["peak"]:
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on: not that of the start
        found = plain(self, *given, **named)
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        gradients = [p.grad for p in self.core.parameters() if p.grad is not None]
        buffers = list(self.core.buffers())
        seen["state"] = local_bytes([*self.core.parameters(), *buffers, *gradients, *moments])
        seen["peak"] = max(seen["peak"], status("VmHWM"))
        return found

    fit.PrecisionTrainer.training_step = step  # type: ignore[method-assign]
    with world.joined("cpu"), tempfile.TemporaryDirectory() as folder:
        before = status("VmRSS")
        out = Path(folder) if world.size() == 1 else told.parent / "run"
        model = make_trainable(random_float(Shape(**SHAPE)).float(), {"w3": Plan.uniform(3)}, group_size=64)

        def objective(forward, batch, presets):  # type: ignore[no-untyped-def]
            loss = sum(forward({"ids_BT": batch}, preset).float().logsumexp(-1).mean() for preset in presets)
            return loss, {}

        teaching = Teaching(
            order=list(range(STEPS * ROWS)),
            gather=lambda rows, _: torch.arange(len(rows) * LENGTH).view(len(rows), LENGTH) % 4096,
            objective=objective,
            presets=("w3",),
        )
        course = Course(steps=STEPS, batch=ROWS, accumulate=2, probes=0, further={"save_strategy": "no"})
        fit.fit(model, teaching, course, out=out)
        found = {
            "state_mb": round(seen["state"] / 1e6, 1),
            "peak_mb": round((seen["peak"] - before) / 1e6, 1),
            "peak_with_start_mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e6, 1),
        }
        if world.first():
            told.write_text(json.dumps(found), encoding="utf-8")


def status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    main()
