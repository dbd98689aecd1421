"""What `polybit eval` measures on: windows of text, prompts to answer, questions with one right answer."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from polybit.compress.text import SELF, text_name, window_length
from polybit.core.runtime import PolybitError
from polybit.data.chat import Prompt
from polybit.data.prompts import gather_prompts
from polybit.data.text import has_chat_template, read_windows
from polybit.evals.compare import Material
from polybit.evals.tasks import embedded_items
from polybit.hub.lm import longest_input

EMBEDDED_TEXT = "embedded-test"  # conversations of names and wordings no training document had
BEGINNING = 16  # tokens of a text that serve as a prompt where no prompts are given
TEST_SEED = 20_000  # seed of the items asked here; the recipe of the embedded model trains and chooses with others


@dataclass(frozen=True, slots=True)
class Gathered:
    """The material, and the text's name for the report."""

    material: Material
    text_name: str


def gather_material(reference, tokenizer, config: Any, *, embedded: bool, tasks: list[str]) -> Gathered:
    """Material for one comparison; `config` is an EvalConfig."""
    length = window_length(reference, config.window)
    source = config.text or (EMBEDDED_TEXT if embedded else SELF)
    if source == SELF:
        from polybit.compress.self_text import self_text

        bos = tokenizer.bos_token_id
        windows = self_text(reference, bos, count=config.windows, length=length, seed=config.seed + 1)
    else:
        windows, warnings = read_windows(source, tokenizer, length, count=config.windows)
        for warning in warnings:
            print(f"polybit: warning: {warning}", file=sys.stderr)
    items = {}
    if tasks or embedded:
        items = embedded_items(max(config.items, config.answers), seed=TEST_SEED + config.seed)
    prompts = choose_prompts(tokenizer, config, windows, items if embedded else {}, longest_input(reference))
    asked = {name: items[name][: config.items] for name in tasks}
    return Gathered(Material(windows, prompts, asked, config.max_tokens), text_name(source))


def choose_prompts(tokenizer, config: Any, windows, items, context: int | None) -> list[Prompt]:
    """The user's prompts, else the questions of the embedded tasks in turn, else beginnings of the text."""
    if context is not None and config.max_tokens >= context - 1:
        raise PolybitError(
            f"--max-tokens {config.max_tokens} leaves no room for a prompt: the model reads {context} tokens"
        )
    if config.prompts:
        return gather_prompts(config.prompts, chat=has_chat_template(tokenizer), limit=config.answers)
    if items:
        each = [[list(item.messages) for item in rows] for rows in items.values()]
        return [prompt for group in zip(*each, strict=False) for prompt in group][: config.answers]
    beginnings = windows[: config.answers, :BEGINNING]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in beginnings]
