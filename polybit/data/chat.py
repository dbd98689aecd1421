"""Conversations as tokens: prompts from a file, chat templates, and which tokens the assistant wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polybit.core.runtime import PolybitError
from polybit.data.text import Messages, encode, has_chat_template, read_messages, read_utf8, renderer

Prompt = str | Messages
PROMPT_KEYS = ("prompt", "question", "instruction", "text")


def read_prompts(source: str | Path, *, chat: bool = True) -> list[Prompt]:
    """Read prompts: .txt has one per line; a .jsonl line has "prompt" (or "question") or "messages".

    With `chat` a plain line becomes the first message of a conversation, otherwise it stays text to continue.
    Of "messages" everything after the last user message is left out, because that is what a model must answer.
    """
    path = Path(source)
    if not path.is_file():
        raise PolybitError(f"Prompt file {str(source)!r} does not exist or is no file; give a .txt or .jsonl file.")
    if path.suffix.lower() not in (".txt", ".jsonl", ".ndjson"):
        raise PolybitError(f"Prompt file {str(source)!r} ends in {path.suffix!r}; give a .txt or a .jsonl file.")
    lines = [(n, line) for n, line in enumerate(read_utf8(path).split("\n"), start=1) if line.strip()]
    if not lines:
        raise PolybitError(f"Prompt file {str(source)!r} is empty; write at least one prompt.")
    if path.suffix.lower() == ".txt":
        return [as_prompt(line.strip(), chat=chat) for _, line in lines]
    return [_read_row(line, f"Line {n} of {str(source)!r}", chat=chat) for n, line in lines]


def as_prompt(text: str, *, chat: bool) -> Prompt:
    """A text as a user's message, or as it is."""
    return [{"role": "user", "content": text}] if chat else text


def _read_row(line: str, where: str, *, chat: bool) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise PolybitError(f"{where} is not JSON ({error.msg}); write one JSON object per line.") from error
    if isinstance(row, str):
        return as_prompt(row, chat=chat)
    found = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
    if isinstance(row, dict) and "messages" in row:
        messages = read_messages(row["messages"], f"{where}, key 'messages',")
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        if messages:
            return messages
        raise PolybitError(f"{where} has no user message to answer; give at least one.")
    for key in PROMPT_KEYS:
        if isinstance(row, dict) and isinstance(row.get(key), str):
            return as_prompt(row[key], chat=chat)
    raise PolybitError(f'{where} has {found or "no keys"}; use {{"prompt"}} or {{"messages"}}.')


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Token ids a model continues: a conversation up to the assistant's turn, or text after the BOS token.

    A conversation without a chat template is its contents, one per line. A BOS token that doubles as EOS (GPT-2) is
    not put before a text, as its tokenizer does not either; an empty prompt becomes that token alone.
    """
    if not isinstance(prompt, str) and has_chat_template(tokenizer):
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        return encode(tokenizer, text).tolist()
    text = prompt if isinstance(prompt, str) else renderer(None)(prompt)
    ids = encode(tokenizer, text).tolist()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and bos != eos and ids[:1] != [bos]:
        return [bos, *ids]
    if not ids:
        if bos is None and eos is None:
            raise PolybitError("An empty prompt needs a BOS or EOS token and this tokenizer has none; give some text.")
        return [eos if bos is None else bos]
    return ids


def encode_conversation(tokenizer: Any, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """Token ids of a whole conversation, and for each token whether the assistant wrote it (its EOS included).

    Works with any template that writes turns one after another; a template that rewrites earlier turns is refused.
    """
    if not has_chat_template(tokenizer):
        raise PolybitError("This tokenizer has no chat template; use plain text, or a tokenizer that has one.")
    messages = list(messages)
    whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
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
