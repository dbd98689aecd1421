"""The JSON of `polybit eval`, described and checked from the table of metrics: `python -m polybit.evals.schema`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from polybit.evals.table import METRICS, REFERENCE, SUITES, TASKS, Gives, Metric

ESTIMATE = ("value", "low", "high", "n")
MARGINS = ("edges", "reference", "quantized", "reference_mean", "quantized_mean", "difference")
CHANGES = ("flips", "correct_to_wrong", "wrong_to_correct")
HEAD = """# The JSON of `polybit eval`

Written by `python -m polybit.evals.schema` from the table of metrics; a test holds both together. `--json FILE` keeps a
run; this describes its `numbers`. E is an estimate `{"value", "low", "high", "n"}`: a mean, its 95 % bootstrap
interval, and how many windows or items were resampled. Shares and scores are 0..1.

| key | what | kind | unit |
|---|---|---|---|
"""
TAIL = """
`text`, `prompts` and all metrics are missing where only suites were asked for. Values that need prompts are null or
empty without them. A preset given as none is called `as loaded`. `margins` counts texts per bin of their mean margin;
its `edges` have one entry more. Deciles run from the smallest value of the float model to the largest, over the tokens
of the text, each `{"from", "to", "value", "low", "high", "n"}`. `answers` shows answers that part before identical
ones.
"""
FIXED = (  # (key, what, kind, unit) of what is no metric
    ("text", "how much text was read; tokens = predicted ones", '{"windows", "window_tokens", "tokens"}', ""),
    ("prompts", "how many prompts were answered", '{"n", "max_tokens"}', ""),
    ("reference.tasks.TASK", "the float model's scores, and the seal of its answers", "{METRIC: E}", "share"),
    ("presets.NAME.bits_per_weight, .bytes", "sizes of the quantized layers, where they are known", "number", ""),
    (
        "presets.NAME.tasks.TASK",
        'scores, paired `"difference"` {METRIC: E}, answers that changed sides, and the seal',
        '{METRIC: E, "difference", "flips": E, "correct_to_wrong": E, "wrong_to_correct": E, "predictions_sha256"}',
        "share",
    ),
    (
        "presets.NAME.answers",
        "a few answers side by side",
        '[{"prompt", "reference", "quantized", "first_difference_token", "tokens_reference", "tokens_quantized"}]',
        "",
    ),
)
KINDS: dict[Gives, str] = {
    "estimate": "E",
    "estimate or null": "E or null",
    "number": "number",
    "curve": "[number]",
    "deciles": "[E with from, to]",
    "margins": "{" + ", ".join(f'"{key}"' for key in MARGINS) + "}",
}


def document() -> str:
    """The description as Markdown."""
    rows = [(f"reference.{key}", m.summary, KINDS[m.gives], m.unit) for key, m in REFERENCE.items()]
    rows += [(f"presets.NAME.{key}", m.summary, KINDS[m.gives], m.unit) for key, m in METRICS.items()]
    rows += FIXED
    for key, suite in SUITES.items():
        if suite.table is not None:
            where = f"presets.NAME.{key}" if suite.measure is None else key
            rows.append((where, f"{suite.summary}, only when asked for", "see its module in evals/", ""))
    lines = [f"| `{key}` | {what} | {kind.replace('|', '/')} | {unit} |" for key, what, kind, unit in rows]
    return HEAD + "\n".join(line.replace(" || ", " ‖ ") for line in lines) + "\n" + TAIL


def problems(numbers: Mapping[str, Any]) -> list[str]:
    """What breaks the description in the numbers of a run, one sentence each; empty for a good one."""
    found: list[str] = []
    reference, presets = numbers.get("reference", {}), numbers.get("presets", {})
    if "text" in numbers:
        found += wrong("reference", reference, REFERENCE)
        for name, row in presets.items():
            found += wrong(f"presets.{name}", row, METRICS)
    for name, row in presets.items():
        for task, scores in row["tasks"].items():
            wanted = {*TASKS[task].metrics, "difference", *CHANGES, "predictions_sha256"} if task in TASKS else scores
            found += [f"presets.{name}.tasks.{task} lacks {key}" for key in wanted if key not in scores]
    return found


def wrong(where: str, row: Mapping[str, Any], metrics: Mapping[str, Metric]) -> list[str]:
    """The metrics that are missing in a row or of another kind than the table says."""
    missing = [f"{where} lacks {key}" for key in metrics if key not in row]
    bad = [
        f"{where}.{k} is not {KINDS[m.gives]}" for k, m in metrics.items() if k in row and not CHECKS[m.gives](row[k])
    ]
    return missing + bad


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_estimate(value: Any) -> bool:
    """Whether it is an estimate whose interval holds its value."""
    if (
        not isinstance(value, Mapping)
        or not set(ESTIMATE) <= set(value)
        or not all(is_number(value[k]) for k in ESTIMATE)
    ):
        return False
    return value["low"] <= value["value"] <= value["high"] and value["n"] >= 1


def is_margins(value: Any) -> bool:
    """Whether it is what token_flip.margin_summary gives."""
    return set(value) == set(MARGINS) and len(value["edges"]) == len(value["reference"]) + 1


CHECKS: dict[Gives, Callable[[Any], bool]] = {
    "estimate": is_estimate,
    "estimate or null": lambda value: value is None or is_estimate(value),
    "number": is_number,
    "curve": lambda value: all(map(is_number, value)),
    "deciles": lambda value: all(is_estimate(row) and {"from", "to"} <= set(row) for row in value),
    "margins": is_margins,
}

if __name__ == "__main__":
    print(document(), end="")
