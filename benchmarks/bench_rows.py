"""What benchmarks that run as several processes share: one file of rows, the device, means over seeds."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t, two-sided 95 %, by sample size


class Rows:
    """JSON lines in one file that several processes append to: a row is written by one call, so lines never mix."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.done = read_rows(path)

    def has(self, key: dict[str, Any]) -> bool:
        """Whether a row was there when this process began."""
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.done)

    def write(self, key: dict[str, Any], row: dict[str, Any]) -> None:
        """Print and keep a row."""
        line = json.dumps({**key, **row}, separators=(",", ":"))
        print(line if len(line) < 600 else line[:600] + " ...", flush=True)
        opened = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(opened, (line + "\n").encode())
        finally:
            os.close(opened)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.is_file() else []


def device_of(name: str) -> torch.device:
    """cpu with one thread, or cuda."""
    torch.set_num_threads(1)
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here")
    return torch.device(name)


def spread(values: list[float]) -> tuple[float, float]:
    """Mean over seeds and half the width of its 95 % interval (Student's t); nan for a single value."""
    if len(values) < 2:
        return statistics.fmean(values), float("nan")
    return statistics.fmean(values), T95.get(len(values), 2.3) * statistics.stdev(values) / len(values) ** 0.5


def cell(values: list[float], digits: int = 1, unit: str = "") -> str:
    """Mean ± half an interval, as the tables print it."""
    mean, half = spread(values)
    return f"{mean:.{digits}f}{unit}" if half != half else f"{mean:.{digits}f} ± {half:.{digits}f}{unit}"
