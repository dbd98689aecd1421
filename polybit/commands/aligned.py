"""What an alignment run found, as numbers and as lines to read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def describe(outcome, frozen, trained: int, held_out: int, settled: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of the run: each width before and after, the choice, the history, the sizes.

    settled: numbers of widths that were kept, after their own bits were chosen again.
    """
    from polybit.compress.sizes import stored_bits_per_weight

    return {
        "prompts": {"train": trained, "held_out": held_out},
        "presets": {
            name: {"before": dict(outcome.start[name]), "after": dict({**outcome.best, **settled}[name])}
            for name in outcome.start
        },
        "kept": outcome.picker.reason(),
        "stopped": outcome.picker.stopped,
        "history": outcome.picker.history,
        "log": outcome.log,
        "train_seconds": outcome.seconds,
        "stored_bits_per_weight": stored_bits_per_weight(frozen),
    }


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
