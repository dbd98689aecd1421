"""What a training run gained at every preset, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def training_table(numbers: Mapping[str, Any]) -> str:
    """A row per preset: held-out loss and share of wrong tokens, at the start and at the end."""
    lines = [f"{'preset':12}{'nats per token: start':>24}{'end':>10}{'wrong tokens: start':>22}{'end':>9}"]
    for preset, row in numbers["presets"].items():
        start, end = row["start"], row["end"]
        lines.append(f"{preset:12}{start['nll']:24.4f}{end['nll']:10.4f}{start['wrong']:22.2%}{end['wrong']:9.2%}")
    if "float" in numbers:
        lines.append(f"{'float':12}{numbers['float']['nll']:24.4f}{'':10}{numbers['float']['wrong']:22.2%}")
    return "\n".join(lines)
