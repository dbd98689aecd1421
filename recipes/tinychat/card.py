"""Write the model card of the embedded model from its scores.

python recipes/tinychat/card.py recipes/tinychat/scores.json polybit/assets/tinychat/README.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from polybit.data import synth

HEAD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# tinychat, the embedded model of polybit

A chat model of {parameters:.2f} million parameters inside the package, so that every command, test and example
runs offline in seconds. It reads short passages, works through arithmetic word problems and holds short conversations,
in the closed world of its generator; it knows nothing else and is not meant to. It is a measuring
instrument: small enough to quantize in a blink, trained long enough that losing bits costs it answers.

- **Architecture**: `LlamaForCausalLM`, {layers} layers, width {width}, {heads} heads of {head}, feed-forward {inner},
  vocabulary {vocabulary}, tied embedding, float32.
- **Data**: synthetic, ours, endless: `polybit.data.synth`. No text of anybody else was used. English words, invented
  names.
- **Training**: from nothing, {tokens:.1f} million tokens, {minutes:.0f} minutes of one CPU core: `recipes/tinychat/`.
- **Format**: `<s><user> question<end><bot> answer<end>`; the template adds the spaces, `<end>` ends a turn and is EOS.
  A system message is put before the next user message. The template marks the assistant's tokens, so
  `return_assistant_tokens_mask` works.
- **Licence**: Apache-2.0.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
from polybit.hub import tiny

tokenizer = AutoTokenizer.from_pretrained(tiny.path())
model = AutoModelForCausalLM.from_pretrained(tiny.path())
passage = "The captain of the Zalkus was Ritoux. Captain Mevon led the Brisha."
chat = [{{"role": "user", "content": f"{{passage}}\\nWho led the Brisha?"}}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
reply = model.generate(**prompt)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(reply, skip_special_tokens=True))
```

A passage and its question are separated by a line break. Text without the template should begin with a space, as in the
middle of a sentence: names are copied token by token. Questions are best put as the generator puts them.
"""


def cell(record: dict) -> str:
    """Per cent with its interval."""
    return f"{record['%']:.1f} ({record['low']:.1f} to {record['high']:.1f})"


def scores(result: dict) -> str:
    """Float scores by task and by the harder groups inside a task."""
    lines = [
        "## Scores",
        "",
        f"Exact replies in per cent, greedy, with 95 % intervals; {result['items per task']} held-out items per task",
        f"(seed {result['seed']}; the checkpoint was chosen with another seed). All names are new; a *new pair* is a",
        "wording or an object that training kept apart from this statement or template. Dialogue counts single turns.",
        "",
        "| items | exact | n |",
        "|---|---|---|",
    ]
    for label, record in result["float"].items():
        if isinstance(record, dict):
            lines.append(f"| {label} | {cell(record)} | {record['n']} |")
    for label, record in result.get("free running", {}).items():
        lines.append(f"| generated freely: {label} | {cell(record)} | {record['n']} |")
    control = result["controls"]
    lines += [
        "",
        f"The scorer gives {control['shuffled replies %']} % to the replies of other items and "
        f"{control['right replies %']} % to the right ones.",
    ]
    return "\n".join(lines)


def damage(result: dict) -> str:
    """What round-to-nearest does at each width."""
    lines = [
        "## What rounding does",
        "",
        "Round-to-nearest on all matrices of the blocks (embedding float), the same items. `channel`: one symmetric",
        "scale per row; `g64`, `g32`: scale and zero per 64 or 32 columns. KL (nats per token, from the float model)",
        "and flips (tokens whose most likely successor changes) over the tokens of the right replies.",
        "",
        "| weights | " + " | ".join(synth.TASKS) + " | mean KL | KL 99.9 % | flips % |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = {"float": result["float"] | {"kl": 0, "kl 99.9 %": 0, "flips %": 0}} | result["rounded"]
    for name, record in rows.items():
        tasks = " | ".join(f"{record[task]['%']:.1f}" for task in synth.TASKS)
        lines.append(f"| {name} | {tasks} | {record['kl']:g} | {record['kl 99.9 %']:g} | {record['flips %']:g} |")
    return "\n".join(lines)


def card(result: dict, config: dict, parameters: int) -> str:
    """The whole card."""
    head = HEAD.format(
        parameters=parameters / 1e6,
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        head=config["head_dim"],
        inner=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        tokens=result["tokens"] / 1e6,
        minutes=result["seconds"] / 60,
    )
    return f"{head}\n{scores(result)}\n\n{damage(result)}\n"


if __name__ == "__main__":
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    config = json.loads((target.parent / "config.json").read_text())
    stored = (target.parent / "model.safetensors").stat().st_size // 4
    target.write_text(card(json.loads(source.read_text()), config, stored))
