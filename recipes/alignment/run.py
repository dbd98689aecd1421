"""Arms of a question about alignment on one model: pairs, training, evaluation, a table. See README.md here.

python run.py MODEL QUESTION.toml --prompts FILE --held-out FILE --out DIR [--steps 150] [--seeds 3] [--precision w3]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

NUMBERS = {"flips": "flips", "KL, nats": "kl", "perplexity": "perplexity"}


def polybit(verb: str, model: str, flags: dict[str, Any]) -> None:
    """Run a verb of polybit with flags; its last words are shown when it refuses."""
    words = [verb, model]
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    done = subprocess.run([sys.executable, "-m", "polybit", *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"polybit {' '.join(words)}\n{done.stderr.strip().splitlines()[-1]}")


def pairs_of(model: str, flags: dict[str, Any], out: Path) -> Path:
    """Pairs made with these flags, once for all arms that share them."""
    name = hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()[:8]
    directory = out / f"pairs-{name}"
    if not (directory / "pairs.done").is_file():
        polybit("pairs", model, flags | {"out": directory})
        (directory / "pairs.done").touch()
    return directory


def measured(target: Path, reference: str, flags: dict[str, Any], file: Path) -> dict[str, Any]:
    """Numbers of `polybit eval`, kept in `file`."""
    if not file.is_file():
        polybit("eval", str(target), flags | {"reference": reference, "json": file})
    return json.loads(file.read_text())["numbers"]


def main() -> None:
    """Run every arm that is not finished and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("question", type=Path)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--held-out", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--precision", help="instead of the question's own, as in w2")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    asked = tomllib.loads(args.question.read_text())
    precision = args.precision or asked["precision"]
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(args.seeds or asked.get("seeds", 3)):
        for name, arm in asked["arms"].items():
            wanted = {"precision": precision, "prompts": args.prompts, "max-tokens": args.max_tokens}
            pairs = pairs_of(args.model, wanted | asked.get("pairs", {}) | arm.get("pairs", {}), args.out)
            learn = asked.get("align", {}) | arm.get("align", {})
            slug = hashlib.sha256(f"{name}{learn}{args.steps}".encode()).hexdigest()[:8]
            target = args.out / f"{slug}-{seed}"
            if not target.is_dir():
                shared = {"pairs": pairs, "precision": precision, "steps": args.steps, "seed": seed}
                polybit("align", args.model, shared | learn | {"out": target})
            look = {"prompts": args.held_out, "answers": 128} | asked.get("eval", {}) | arm.get("eval", {})
            found.setdefault(name, []).append(measured(target, args.model, look, args.out / f"{slug}-{seed}.json"))
            print(name, seed, summary(found[name][-1:]), flush=True)
    print("\n| arm | " + " | ".join(NUMBERS) + " |\n|---|" + "---|" * len(NUMBERS))
    for name, runs in found.items():
        print(f"| {name} | " + " | ".join(f"{value:.4f}" for value in summary(runs).values()) + " |")


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Means over runs of the numbers of the table."""
    return {label: sum(number(run, key) for run in runs) / len(runs) for label, key in NUMBERS.items()}


def number(run: dict[str, Any], key: str) -> float:
    """One number of the only width of a run."""
    (width,) = run["presets"].values()
    return float(width[key]["value"])


if __name__ == "__main__":
    main()
