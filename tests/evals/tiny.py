"""A tokenizer of single characters for the tiny models, and models that need no weights: null, gold, shuffled gold."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from polybit.hub.lm import LogLik

SPECIAL = ("<pad>", "<s>", "<end>")
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,!?:;#+-=*/()'\"\n@&%$[]"
TEMPLATE = (
    "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% if m.role == 'assistant' %}<end>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tokenizer(*, bos: bool = True, chat: bool = True) -> Any:
    """One token per character, ids below 96, with <s> = 1 and <end> = 2."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="@"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>" if bos else None, eos_token="<end>", pad_token="<pad>"
    )
    if chat:
        made.chat_template = TEMPLATE
    return made


@dataclass(frozen=True)
class Item:
    """A question with its answer, as polybit.data.synth.Item."""

    id: str
    messages: tuple[dict[str, str], ...]
    answer: str
    extras: dict[str, Any] = field(default_factory=dict)


def items(task: str, n: int = 40) -> list[Item]:
    """Items whose answers all differ, so that a shuffled answer is a wrong one."""
    answers = {
        "reading": lambda i: f"the Tower of {CHARACTERS[i % 26] * 3}{i}",
        "arithmetic": lambda i: f"First {i}+{i}={2 * i}. #### {1000 + 2 * i}",
        "dialogue": lambda i: f"Your name is N{i}.",
    }
    return [
        Item(f"{task}-{i}", ({"role": "user", "content": f"{task} question {i}?"},), answers[task](i)) for i in range(n)
    ]


class ScriptedLM:
    """Answers from a table prompt -> text; nothing for a prompt it does not know."""

    def __init__(self, table: dict[str, str]):
        self.table = table

    def generate(self, prompts, *, max_tokens, stop=()):
        return [self.table.get(prompt if isinstance(prompt, str) else prompt[-1]["content"], "") for prompt in prompts]

    def loglik(self, pairs, *, label=""):
        return [
            LogLik(0.0, 1, True) if self.table.get(context) == continuation else LogLik(-9.0, 1, False)
            for context, continuation in pairs
        ]


def null_lm() -> ScriptedLM:
    """Emits nothing."""
    return ScriptedLM({})


def gold_lm(asked: list[Item]) -> ScriptedLM:
    """Knows every answer."""
    return ScriptedLM({item.messages[-1]["content"]: item.answer for item in asked})


def shuffled_gold_lm(asked: list[Item], seed: int = 0) -> ScriptedLM:
    """Knows every answer but gives each question the answer of a random one (perhaps its own)."""
    answers = [item.answer for item in asked]
    random.Random(seed).shuffle(answers)
    return ScriptedLM(dict(zip((item.messages[-1]["content"] for item in asked), answers, strict=True)))
