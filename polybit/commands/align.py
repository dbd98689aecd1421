"""`polybit align`: teach a quantized model to answer as its float self, and save a checkpoint of the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from polybit.commands.flags import Json, keep
from polybit.core.nursery import warm
from polybit.options.align import AlignOptions


def align(model: str, /, *, options: Annotated[AlignOptions, Parameter(name="*")], json: Json = None) -> None:
    """Train MODEL (a float model or a polybit checkpoint) at --precision to answer as its float self.

    The result is a normal checkpoint with the bytes and the speed of one that was never trained. The moment of the run
    with the fewest held-out flips and the smallest KL is kept, the start if nothing beats it.
    """
    warm(options, "polybit.acts.align")
    from polybit.acts.align import align as act

    run = act(model, options)
    keep(run, json)
    print_result(options.out, run.numbers)


def print_result(out: Path, numbers: Mapping[str, Any]) -> None:
    """Each width before and after, what was kept, and what to type next."""
    rows = [("width", "flips", "", "KL, nats", "")]
    for preset, row in numbers["presets"].items():
        before, after = row["before"], row["after"]
        rows.append(
            (
                preset,
                f"{before['flips']:.2%}",
                f"-> {after['flips']:.2%}",
                f"{before['kl']:.4f}",
                f"-> {after['kl']:.4f}",
            )
        )
    for row in rows:
        print("  ".join(f"{cell:>10}" for cell in row))
    print(f"\nOn {numbers['prompts']['held_out']} held-out prompts; {numbers['kept']}.")
    print(f"{out}: {numbers['stored_bits_per_weight']:.2f} stored bits per weight. Saved and compared: equal.")
    print(f"Next: polybit eval {out} --json eval.json")
