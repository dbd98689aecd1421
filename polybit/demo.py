"""`make demo`: the whole product on the embedded model, with the commands a user would type."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

from polybit.cli import main as polybit

OUT = Path("demo")
PROMPT = "Drejugair has 20 keys. Kikru has 15 more than Drejugair. How many keys do they have in all?"
STEPS = (
    "plan tinychat",
    "quantize tinychat --out {out}/tinychat --overwrite --json {out}/quantize.json",
    "eval {out}/tinychat --reference tinychat --windows 64 --tasks reading,arithmetic,dialogue --items {items} "
    "--json {out}/eval.json",
    "report {out}/tinychat --eval {out}/eval.json --out {out}/report.html",
)
WIDTHS = ("float", "w8", "w4", "w3", "w2")


def run(command: str) -> None:
    """Print a command as a user would type it, and run it here."""
    print(f"\n$ polybit {command}", flush=True)
    polybit(shlex.split(command))


def main(items: int = 100) -> None:
    """Plan, quantize, measure, report, and one prompt answered at several widths."""
    started = time.perf_counter()
    OUT.mkdir(exist_ok=True)
    for step in STEPS:
        run(step.format(out=OUT, items=items))
    print(f"\nOne prompt at several widths, from one stored file:\n> {PROMPT}")
    for width in WIDTHS:
        model = "tinychat" if width == "float" else f"{OUT}/tinychat"
        precision = "" if width == "float" else f" --precision {width}"
        run(f"generate {model} --prompt {shlex.quote(PROMPT)}{precision}")
    print(f"\nDone in {time.perf_counter() - started:.0f} s. Open {OUT}/report.html")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
