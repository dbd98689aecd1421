"""Whether this tree makes the same checkpoints, byte for byte, as another revision of it.

    python tests/same_bytes.py HEAD~1              # every method; a line each, exit status 1 when one differs
    python tests/same_bytes.py v0.1.0 gptq align   # only these

Both trees run the same commands on the embedded model, here and now, so the machine's own rounding does not matter. The
model card and the record of the run hold times and paths; everything else of a checkpoint is compared by its sha256.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from apart import instead_of_installed

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--samples", "8", "--window", "64", "--no-measure", "--seed", "3"]
TRAIN = ["--steps", "4", "--batch", "2", "--seed", "3"]
TEXTS = {"prompts.txt": "How are you?\nWhat is 3 plus 4?\nTell me a story.\nWho are you?\nWhat is 9 minus 2?\nHi!\n"}
PLAN = '{"default": "w4", "layers": {"model.layers.0.mlp.down_proj": "w2"}}'
PAIRS = ["pairs", "tinychat", "--prompts", "prompts.txt", "--precision", "w2", "--max-tokens", "24", "--out"]
CASES: dict[str, list[list[str]]] = {  # name -> commands; OUT is the directory that is compared, OUT.x one on the way
    "nested": [["quantize", "tinychat", *SMALL, "--widths", "8,4,3", "--out", "OUT"]],
    "nested-best": [["quantize", "tinychat", *SMALL, "--widths", "4,2", "--effort", "best", "--out", "OUT"]],
    "rounding": [["quantize", "tinychat", *SMALL, "--bits", "3", "--out", "OUT"]],
    "gptq": [["quantize", "tinychat", *SMALL, "--bits", "3", "--method", "gptq", "--out", "OUT"]],
    "awq": [["quantize", "tinychat", *SMALL, "--bits", "4", "--method", "awq", "--out", "OUT"]],
    "hqq": [["quantize", "tinychat", *SMALL, "--bits", "4", "--method", "hqq", "--out", "OUT"]],
    "rtn": [["quantize", "tinychat", *SMALL, "--bits", "4", "--method", "rtn", "--ends", "8", "--out", "OUT"]],
    "ends": [["quantize", "tinychat", *SMALL, "--widths", "6,3", "--effort", "fast", "--ends", "8", "--out", "OUT"]],
    "embeddings": [
        ["quantize", "tinychat", *SMALL, "--bits", "4", "--method", "gptq", "--include-embeddings", "--out", "OUT"]
    ],
    "plan": [["quantize", "tinychat", *SMALL, "--plan", "plan.json", "--method", "gptq", "--out", "OUT"]],
    "columns": [
        ["columns", "tinychat", "--bits", "3.5", "--samples", "8", "--window", "64", "--out", "OUT.json"],
        [
            "quantize",
            "tinychat",
            *SMALL,
            "--plan",
            "OUT.json",
            "--method",
            "gptq",
            "--group-size",
            "32",
            "--out",
            "OUT",
        ],
    ],
    "rotate": [["quantize", "tinychat", *SMALL, "--bits", "4", "--method", "gptq", "--rotate", "--out", "OUT"]],
    "align": [
        [*PAIRS, "OUT.pairs"],
        ["align", "tinychat", "--pairs", "OUT.pairs", "--precision", "w2", *TRAIN, "--out", "OUT"],
    ],
    "align-widths": [
        ["quantize", "tinychat", *SMALL, "--widths", "8,4,2", "--effort", "fast", "--out", "OUT.nested"],
        [*PAIRS, "OUT.pairs"],
        ["align", "OUT.nested", "--pairs", "OUT.pairs", "--precision", "w2", *TRAIN, "--out", "OUT"],
    ],
    "qdpo": [
        [*PAIRS, "OUT.pairs"],
        ["align", "tinychat", "--pairs", "OUT.pairs", "--precision", "w2", "--method", "qdpo", *TRAIN, "--out", "OUT"],
    ],
    "train": [["train", "tinychat", "--presets", "A=w8a8,B=w4a4", "--data", "embedded", *TRAIN, "--out", "OUT"]],
}
LEFT_OUT = ("README.md", "run.json", ".lock")


def main() -> int:
    """Run the cases in both trees and compare."""
    revision, *wanted = sys.argv[1:]
    cases = {name: CASES[name] for name in wanted or CASES}
    differing = []
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "tree"
        subprocess.run(
            ["git", "worktree", "add", "--detach", other, revision], cwd=ROOT, check=True, capture_output=True
        )
        try:
            for built in (ROOT / "polybit" / "kernels").glob("*.so"):
                shutil.copy(built, other / "polybit" / "kernels")
            for name, commands in cases.items():
                here, there = (digests(tree, commands, Path(folder) / tree.name / name) for tree in (ROOT, other))
                if isinstance(here, str) or isinstance(there, str):
                    verdict = f"not run here: {here}" if isinstance(here, str) else f"not run in {revision}: {there}"
                else:
                    keys = here.keys() | there.keys()
                    odd = sorted(key for key in keys if here.get(key) != there.get(key))
                    verdict = f"{len(odd)} of {len(keys)} files differ: {', '.join(odd)}" if odd else "same"
                if verdict != "same":
                    differing.append(name)
                print(f"{name:14} {verdict}", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=ROOT, check=False, capture_output=True)
    return 1 if differing else 0


def digests(tree: Path, commands: list[list[str]], folder: Path) -> dict[str, str] | str:
    """Path -> sha256 of the checkpoint the commands make with `tree`'s package, or what the one that failed said."""
    folder.mkdir(parents=True)
    for name, text in {**TEXTS, "plan.json": PLAN}.items():
        (folder / name).write_text(text)
    path = instead_of_installed(tree, folder / "start")
    environment = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(folder / "cache")}
    for command in commands:
        words = [sys.executable, "-m", "polybit", *command]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            return done.stderr.strip().splitlines()[-1]
    out = folder / "OUT"
    files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in LEFT_OUT]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    raise SystemExit(main())
