"""Train the tokenizer of the embedded model and write it as a Hugging Face tokenizer.

Byte-level BPE of 1,024 tokens on generated text. Three rules make copying possible for a small model: every digit is a
token of its own, every text begins with one space (a name is the same tokens at the start of an answer as inside a
passage), and pieces are split as GPT-2 splits them, which other engines know how to repeat.

    python recipes/tinychat/tokenizer.py OUT_DIRECTORY        (5 seconds)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from polybit.data import synth

VOCABULARY = 1024
DOCUMENTS = 9_000
SEED = 7
PAD, BEGIN, END, USER, BOT = SPECIALS = ("<pad>", "<s>", "<end>", "<user>", "<bot>")
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- set opening = namespace(text='') -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{%- set opening.text = opening.text + message['content'] | trim + '\\n' -%}
{%- elif message['role'] == 'user' -%}
{{- '<user> ' + opening.text + message['content'] | trim + '<end>' -}}
{%- set opening.text = '' -%}
{%- elif message['role'] == 'assistant' -%}
{{- '<bot>' -}}
{%- generation -%}
{{- ' ' + message['content'] | trim + '<end>' -}}
{%- endgeneration -%}
{%- else -%}
{{- raise_exception('Role ' + message['role'] + ' is unknown; use system, user or assistant.') -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<bot>' -}}
{%- endif -%}
"""


def texts(count: int, seed: int) -> Iterator[str]:
    """Messages of generated documents, each with its leading space."""
    for conversation in synth.conversations(count, seed):
        for message in conversation:
            yield " " + message["content"]


def train(count: int = DOCUMENTS, seed: int = SEED) -> Tokenizer:
    """Learn the merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(count, seed), trainer)
    return tokenizer


def write(tokenizer: Tokenizer, directory: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [USER, BOT],
        "model_max_length": 1024,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


if __name__ == "__main__":
    write(train(), Path(sys.argv[1]))
