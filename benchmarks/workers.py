"""What two workers gain over one: wall seconds of sensitivities, pairs and evaluation, and who spent the CPU seconds.

    OMP_NUM_THREADS=1 python -m benchmarks.workers --rounds 2 --json FILE

Every run is a fresh process, one thread each, and rounds are interleaved; the load before each run is told, because on
a machine that others use wall time says who else was there. `reckoned` is the ratio of CPU seconds: all of the one
process against those of who hires and of the slower worker of each team, who would take turns on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VERBS: dict[str, list[str]] = {
    "sensitivities": [
        "allocate", "MODEL", "--bits", "3.5", "--samples", "24", "--items", "24", "--widths", "2,3,4,5,6",
        "--method", "rtn", "--calibration-samples", "16", "--cache", "OUT/cache", "--out", "OUT/plan.json",
    ],
    "pairs": [
        "pairs", "MODEL", "--prompts", "embedded", "--limit", "768", "--shard", "32", "--max-tokens", "96",
        "--precision", "w4", "--out", "OUT/pairs",
    ],
    "more pairs": [
        "pairs", "MODEL", "--prompts", "embedded", "--limit", "3072", "--shard", "32", "--max-tokens", "96",
        "--precision", "w4", "--out", "OUT/pairs",
    ],
    "evaluation": ["eval", "CHECKPOINT", "--windows", "384", "--answers", "64", "--json", "OUT/eval.json"],
}  # fmt: skip


def main() -> None:
    """Measure, and print or write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="tinychat")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=list(VERBS), nargs="+", default=list(VERBS))
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--one", nargs=2, metavar=("VERB", "WORKERS"), help="a single run, told on stdout")
    parser.add_argument("--checkpoint", default=None)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], int(args.one[1]), args.model, args.checkpoint)))
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = f"{folder}/checkpoint"
        quick = ["--samples", "8", "--no-measure", "--effort", "fast", "--widths", "8,4,3,2", "--out", checkpoint]
        subprocess.run([sys.executable, "-m", "polybit", "quantize", args.model, *quick], check=True)
        rows = [row(verb, args, checkpoint) for verb in args.only]
    print(json.dumps(rows, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def row(verb: str, args: argparse.Namespace, checkpoint: str) -> dict:
    """All rounds of one verb."""
    found: dict[int, list[dict]] = {1: [], 2: []}
    for _ in range(args.rounds):
        for workers in found:
            words = ["-m", "benchmarks.workers", "--model", args.model, "--checkpoint", checkpoint]
            done = subprocess.run(
                [sys.executable, *words, "--one", verb, str(workers)], check=True, capture_output=True, text=True
            )
            found[workers].append(json.loads(done.stdout.splitlines()[-1]))
    wall = {n: [run["wall"] for run in runs] for n, runs in found.items()}
    ratios = [a / b for a, b in zip(wall[1], wall[2], strict=True)]
    return {
        "verb": verb,
        "one": round(sum(wall[1]) / len(ratios), 1),
        "two": round(sum(wall[2]) / len(ratios), 1),
        "ratio": round(sum(ratios) / len(ratios), 2),
        "least": round(min(ratios), 2),
        "reckoned": round(sum(r["own"] for r in found[1]) / sum(r["own"] + r["slowest"] for r in found[2]), 2),
        "load": round(max(run["load"] for runs in found.values() for run in runs), 1),
        "runs": found,
    }


def one(verb: str, workers: int, model: str, checkpoint: str | None) -> dict:
    """One run in this process."""
    from multiprocessing.forkserver import _forkserver

    from polybit.cli import main as polybit
    from polybit.hub import processes

    spent: list[float] = []
    plain = processes.Processes.end

    def end(self: processes.Processes) -> None:
        spent.extend(cpu_seconds(process.pid) for process, _ in self.people.values())
        plain(self)

    processes.Processes.end = end  # type: ignore[method-assign]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        places = {"MODEL": model, "CHECKPOINT": checkpoint or model}
        words = [places.get(word, word).replace("OUT", folder) for word in VERBS[verb]]
        stdout, sys.stdout = sys.stdout, sys.stderr
        polybit([*words, *(["--workers", str(workers)] if workers > 1 else [])])
        sys.stdout = stdout
    teams = [sum(spent[at : at + workers]) for at in range(0, len(spent), workers)]
    slowest = [max(spent[at : at + workers]) for at in range(0, len(spent), workers)]
    return {
        "own": time.process_time(),
        "slowest": sum(slowest),
        "others": sum(teams) - sum(slowest),
        "nursery": cpu_seconds(_forkserver._forkserver_pid) if spent else 0.0,
        "wall": time.monotonic() - began,
        "load": os.getloadavg()[0],
    }


def cpu_seconds(pid: int) -> float:
    """User and system seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
