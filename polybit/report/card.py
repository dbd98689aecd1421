"""The model card written beside the weights: what it is, what it costs, how to use and to repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polybit.report.summary import markdown_table
from polybit.report.tables import markdown, percent, size


def model_card(base_model: str, run: Mapping[str, Any]) -> str:
    """README.md of a checkpoint, with the front matter the hub reads."""
    numbers = run["numbers"]
    presets = numbers.get("presets") or [f"w{b}" for b in numbers["widths"]]
    front = ["---", "library_name: transformers", f"base_model: {base_model}", "base_model_relation: quantized"]
    front += ["tags:", "- polybit", "- quantized", "pipeline_tag: text-generation", "---"]
    parts = [
        "\n".join(front),
        f"# {base_model}, quantized with polybit",
        what_it_is(numbers),
        "## Use",
        usage(presets[-1]),
    ]
    if "measured" in numbers:
        text = numbers["measured"]["text"]
        parts += [
            "## Measured against the float model",
            markdown_table(numbers["measured"]),
            f"On {text['tokens']:,} tokens of held-out text, 95 % bootstrap intervals, paired. Flips: share of tokens "
            "for which the likeliest next token differs.",
        ]
    sizes = [[name, f"{row['bits_per_weight']:.3f}", size(row["bytes"])] for name, row in numbers["sizes"].items()]
    parts += ["## Size of the quantized layers", markdown(["precision", "bits per weight", "bytes read"], sizes)]
    left = [
        [row["name"], f"{row['parameters']:,}", percent(row["share"]), row["reason"]]
        for row in numbers["left_in_float"]
    ]
    parts += ["## What stays in float", markdown(["weights", "number", "share", "why"], left)]
    if run.get("command"):
        parts += ["## Made with", f"```\n{run['command']}\n```"]
    return "\n\n".join(parts) + "\n"


def what_it_is(numbers: Mapping[str, Any]) -> str:
    """One paragraph."""
    widths = numbers["widths"]
    if len(widths) > 1:
        many = f"one stored set of weights that runs at {', '.join(map(str, widths))} bits"
    elif numbers.get("presets") == ["plan"]:
        many = "a fixed file with a width for each layer"
    else:
        many = f"{widths[0]} bits"
    turned = ""
    if "rotation" in numbers:
        added = numbers["rotation"]["untied_head_bytes"]
        turned = " Its residual stream and values are rotated, which changes no output of the float model"
        turned += f"; its output head is no longer tied and adds {size(added)}." if added else "."
    return (
        f"{len(numbers['layers'])} layers as {many}; {numbers['stored_bits_per_weight']:.2f} stored bits per weight, "
        f"scales and zero points counted.{turned}"
    )


def usage(preset: str) -> str:
    """Two ways to run it."""
    return f"""```python
import polybit  # pip install polybit
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
polybit.use(model, "{preset}")
```

```
polybit generate PATH --prompt "Hello" --precision {preset}
```"""
