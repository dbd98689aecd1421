"""What `eval` measures on: windows of text, prompts to answer, questions with one right answer."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from polybit.compress.self_text import self_text
from polybit.compress.text import SELF, text_name, window_length
from polybit.core.runtime import PolybitError
from polybit.data.chat import Prompt
from polybit.data.prompts import gather_prompts
from polybit.data.text import has_chat_template, read_windows
from polybit.evals.compare import EvalMaterial
from polybit.evals.tasks import TaskItem, embedded_items
from polybit.hub.lm import LocalLM, longest_input
from polybit.options.checks import names_of
from polybit.options.evaluate import WINDOWS, EvalOptions

EMBEDDED_TEXT = "embedded-test"  # conversations of names and wordings no training document had
BEGINNING = 16  # tokens of a text that serve as a prompt where no prompts are given
TEST_SEED = 20_000  # seed of the items asked here; the recipe of the embedded model trains and chooses with others


def gather_material(reference: LocalLM, options: EvalOptions, *, embedded: bool) -> tuple[EvalMaterial, str]:
    """What both models are compared on, and the name of the text; embedded: the reference is the embedded model."""
    tasks = names_of(options.tasks)
    items: dict[str, list[TaskItem]] = {}
    if tasks or embedded:
        items = embedded_items(max(options.items, options.answers), seed=TEST_SEED + options.seed)
    asked = {name: items[name][: options.items] for name in tasks}
    if not options.with_text:
        return EvalMaterial(None, (), asked, options.max_tokens), ""
    source = options.text or (EMBEDDED_TEXT if embedded else SELF)
    windows = read_text(reference, source, options)
    prompts = choose_prompts(
        reference.tokenizer,
        windows,
        items if embedded else {},
        source=options.prompts,
        count=options.answers,
        max_tokens=options.max_tokens,
        context=longest_input(reference.model),
    )
    return EvalMaterial(windows, prompts, asked, options.max_tokens), text_name(source)


def read_text(reference: LocalLM, source: str, options: EvalOptions) -> Tensor:
    """Windows of the text, int64 [N, T]; SELF = the reference writes them."""
    count, length = options.windows or WINDOWS, window_length(reference.model, options.window)
    if source == SELF:
        bos = reference.tokenizer.bos_token_id
        return self_text(reference.model, bos, count=count, length=length, seed=options.seed + 1)
    windows, warnings = read_windows(source, reference.tokenizer, length, count=count)
    for warning in warnings:
        print(f"polybit: warning: {warning}", file=sys.stderr)
    return windows


def choose_prompts(
    tokenizer: Any,
    windows: Tensor,
    items: Mapping[str, Sequence[TaskItem]],
    *,
    source: str | None,
    count: int,
    max_tokens: int,
    context: int | None,
) -> list[Prompt]:
    """The user's prompts, else the questions of the embedded tasks in turn, else beginnings of the text."""
    if context is not None and max_tokens >= context - 1:
        raise PolybitError(f"--max-tokens {max_tokens} leaves no room for a prompt: the model reads {context} tokens")
    if source:
        return gather_prompts(source, chat=has_chat_template(tokenizer), limit=count)
    if items:
        each = [[list(item.messages) for item in rows] for rows in items.values()]
        return [prompt for group in zip(*each, strict=False) for prompt in group][:count]
    beginnings = windows[:count, :BEGINNING]
    return [tokenizer.decode(row, skip_special_tokens=True) for row in beginnings]
