"""Conversations as tokens: prompts from a file, chat templates, and which tokens the assistant wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polybit.core.runtime import PolybitError
from polybit.data.files import NAMED, Row, form_of, read_file
from polybit.data.stream import encode
from polybit.data.text import has_chat_template, in_template
from polybit.data.turns import CHAT_KEYS, Messages, asked_of, plain_text, read_messages

Prompt = str | Messages
PROMPT_KEYS = ("prompt", "question", "instruction", "text", "q")


def read_prompts(source: str | Path, *, chat: bool = True) -> list[Prompt]:
    """Read prompts of a file: .txt has one per line; a row of any other has "prompt" (or "question"), or messages.

    With `chat` a plain line becomes the first message of a conversation, otherwise it stays text to continue.
    Of "messages" everything after the last user message is left out, because that is what a model must answer.
    """
    path = Path(source)
    if not path.is_file():
        raise PolybitError(f"Prompt file {str(source)!r} does not exist or is no file; give {NAMED}.")
    rows = read_file(path)
    if form_of(path) == "text":
        rows = [(where, line.strip()) for where, text in rows for line in text.split("\n") if line.strip()]
    if not rows:
        raise PolybitError(f"Prompt file {str(source)!r} is empty; write at least one prompt.")
    if form_of(path) == "table":
        rows = table_prompts(rows, str(source))
    return [prompt_of(row, where, chat=chat) for where, row in rows]


def table_prompts(rows: Sequence[Row], name: str) -> list[Row]:
    """The column of a table whose name, in capitals or not, means a prompt; rows without one are left out."""
    columns = {str(column).strip().lower(): column for column in rows[0][1]}
    if any(key in columns for key in CHAT_KEYS):
        raise PolybitError(f"{name!r} has conversations in a table; write them as .jsonl or .parquet.")
    column = next((columns[key] for key in PROMPT_KEYS if key in columns), None)
    if column is None and len(columns) == 1:
        column = next(iter(columns.values()))
    if column is None:
        raise PolybitError(
            f"Prompt file {name!r} has the columns {', '.join(columns) or 'none'}; name one of them "
            f"{', '.join(PROMPT_KEYS[:-1])} or Q."
        )
    return [(where, row[column].strip()) for where, row in rows if row[column] and row[column].strip()]


def as_prompt(text: str, *, chat: bool) -> Prompt:
    """A text as a user's message, or as it is."""
    return [{"role": "user", "content": text}] if chat else text


def prompt_of(row: Any, where: str, *, chat: bool) -> Prompt:
    """What one row asks."""
    if isinstance(row, str):
        return as_prompt(row, chat=chat)
    fields = row if isinstance(row, dict) else {}
    for key in ("prompt", *CHAT_KEYS):
        if isinstance(fields.get(key), list):
            if fields[key] and all(isinstance(turn, str) for turn in fields[key]):
                return as_prompt(fields[key][0], chat=chat)  # MT-Bench: the next question needs an answer
            messages = read_messages(fields[key], f"{where}, key {key!r},")
            while messages and messages[-1]["role"] not in ("user", "tool"):
                messages.pop()
            if messages:
                return messages
            raise PolybitError(f"{where} has no user message to answer; give at least one.")
    for key in PROMPT_KEYS:
        if isinstance(fields.get(key), str):
            return as_prompt(asked_of(fields, key), chat=chat)
    found = ", ".join(map(repr, fields)) if fields else type(row).__name__
    raise PolybitError(f'{where} has {found}; use {{"prompt"}} or {{"messages"}}.')


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids a model continues: a conversation up to the assistant's turn, or text after the BOS token.

    A conversation without a chat template is its contents, one per line. A BOS token that doubles as EOS (GPT-2) is
    not put before a text, as its tokenizer does not either; an empty prompt becomes that token alone.
    """
    if not isinstance(prompt, str) and has_chat_template(tokenizer):
        text = in_template(tokenizer, prompt, add_generation_prompt=True)
        return encode(tokenizer, text).tolist()
    text = prompt if isinstance(prompt, str) else plain_text(prompt)
    ids = encode(tokenizer, text).tolist()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and bos != eos and ids[:1] != [bos]:
        return [bos, *ids]
    if not ids:
        if bos is None and eos is None:
            raise PolybitError("An empty prompt needs a BOS or EOS token and this tokenizer has none; give some text.")
        return [eos if bos is None else bos]
    return ids


def encode_conversation(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    """Token ids of a whole conversation, and for each token whether the assistant wrote it (its EOS included).

    Works with any template that writes turns one after another; a template that rewrites earlier turns is refused.
    """
    if not has_chat_template(tokenizer):
        raise PolybitError("This tokenizer has no chat template; use plain text, or a tokenizer that has one.")
    messages = list(messages)
    whole = in_template(tokenizer, messages)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = in_template(tokenizer, messages[:turn], add_generation_prompt=True)
        after = in_template(tokenizer, messages[: turn + 1])
        if not (whole.startswith(after) and after.startswith(before)):
            raise PolybitError(
                f"The chat template rewrites turn {turn + 1} when others follow, so its tokens cannot be told apart; "
                "give conversations that end with their only assistant turn."
            )
        # blanks after EOS belong to the template: the assistant never writes them
        spans.append((len(before), len(after.rstrip())))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [start for start, _ in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), [any(low <= start < high for low, high in spans) for start in starts]
