"""What is said of an export: one sentence for the terminal, and the model card beside the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

from polybit.report.summary import markdown_table
from polybit.report.tables import estimate, markdown, percent, size


class EngineWords(Protocol):
    """What the card says of a format."""

    @property
    def engines(self) -> str:
        """Who runs it."""
        ...

    @property
    def run(self) -> str:
        """One line that runs it, with {path}."""
        ...

    @property
    def also(self) -> tuple[str, ...]:
        """Lines of its other engines."""
        ...


def how_exact(numbers: Mapping[str, Any]) -> str:
    """What an engine reads beside what polybit reads."""
    found = numbers["difference"]
    count = f"{found['weights']:,}"
    if not found["differing"]:
        return f"Checked: all {count} weights read back as polybit reads them, bit for bit."
    said = f"Checked: {found['moved']:,} of {count} weights mean another code"
    if found["tiny"]:
        said += f", {found['tiny']:,} of them where scales are below 6e-5, the least that float16 holds well"
    said += f"; rounding moves weights by {percent(found['relative'])} of their size in the mean"
    if "measured" in numbers:
        seen = numbers["measured"]
        said += f"; KL {estimate(seen['kl'])} nats on {seen['tokens']:,} tokens"
    return said + "."


def export_card(base_model: str, record: Mapping[str, Any], engine: EngineWords) -> str:
    """README.md of an export, with the front matter the hub reads."""
    numbers, config = record["numbers"], record["config"]
    front = ["---", f"base_model: {base_model}", "base_model_relation: quantized", "tags:", "- polybit"]
    front += ["- quantized", f"- {config['to']}", "pipeline_tag: text-generation", "---"]
    parts = [
        "\n".join(front),
        f"# {base_model} at {numbers['precision']} for {engine.engines}",
        how_exact(numbers),
        "## Use",
        "```\n" + "\n".join(line.format(path="PATH") for line in (engine.run, *engine.also)) + "\n```",
    ]
    if record.get("parent"):
        parts += ["## The checkpoint measured against the float model", markdown_table(record["parent"])]
    kinds = Counter(numbers["layers"].values()).most_common()
    parts += ["## Layers", markdown(["held as", "layers"], [[kind, str(count)] for kind, count in kinds])]
    if where := numbers["difference"]["where"]:
        rows = [[name, f"{count:,}"] for name, count in where.items()]
        parts += ["## Where weights mean another code", markdown(["layer", "weights"], rows)]
    files = [[name, size(count)] for name, count in numbers["files"].items()]
    parts += ["## Files", markdown(["file", "size"], files), "## Made with", f"```\n{record['command']}\n```"]
    return "\n\n".join(parts) + "\n"
