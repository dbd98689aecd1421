"""Conversations as files write them: OpenAI's messages with parts and tools, ShareGPT's turns, pairs; one form inside.

A message is {"role", "content"}, both texts, and where there are tools `tool_calls`, `tool_call_id` or `name`, so that
a chat template finds what it knows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from polybit.core.runtime import PolybitError

Messages = list[dict[str, Any]]

SINGLE_KEYS = ("text", "content")
CHAT_KEYS = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns", "chosen")
PAIR_KEYS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("prompt", "answer"),
    ("prompt", "chosen"),
    ("question", "answer"),
    ("question", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
)
NAMES = (("role", "content"), ("from", "value"), ("role", "value"), ("speaker", "text"))  # of a turn's two fields
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
TEXT_PARTS = ("text", "input_text", "output_text")
KEPT = ("tool_calls", "tool_call_id", "name")
FORMS = 'use {"text"}, {"messages": [{"role", "content"}]} or a pair such as {"prompt", "response"}'


def documents_of(row: Any, where: str) -> list[str | Messages]:
    """What one row of a file or of a dataset holds to read: one document, or of an article of SQuAD one for each
    passage."""
    if not isinstance(row, Mapping):
        return [document_of(row, where)]
    if isinstance(row.get("paragraphs"), list):
        passages = [passage for passage in row["paragraphs"] if isinstance(passage, Mapping)]
        return [passage_talk(passage.get("context"), passage.get("qas"), where) for passage in passages]
    if "context" in row and "question" in row:
        return [passage_talk(row["context"], [row], where)]
    return [document_of(row, where)]


def passage_talk(context: Any, questions: Any, where: str) -> Messages:
    """A passage, the questions about it that have an answer there, and the first answer of each, as one conversation:
    the passage is read once."""
    if not isinstance(context, str) or not isinstance(questions, list):
        raise PolybitError(f"{where} has a passage without 'context' or 'qas'; {FORMS}.")
    talk: Messages = []
    for row in questions:
        answer = None if not isinstance(row, Mapping) or row.get("is_impossible") else first_answer(row)
        if answer is not None:
            asked = str(row.get("question", "")).strip()
            talk.append({"role": "user", "content": asked if talk else f"{context}\n{asked}"})
            talk.append({"role": "assistant", "content": answer})
    return talk or [{"role": "user", "content": context}]


def first_answer(row: Mapping[str, Any]) -> str | None:
    """The first of SQuAD's answers, in the official file or flat; None where there is none in words."""
    given = row.get("answers", row.get("answer"))
    texts = given.get("text") if isinstance(given, Mapping) else given
    first = texts[0] if isinstance(texts, list) and texts else texts
    answer = first.get("text") if isinstance(first, Mapping) else first
    return answer if isinstance(answer, str) and answer.strip() else None


def document_of(row: Any, where: str) -> str | Messages:
    """One row of a file or of a dataset: plain text, or messages."""
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        raise PolybitError(f"{where} is a {type(row).__name__}, not an object; {FORMS}.")
    for key in SINGLE_KEYS:
        if isinstance(row.get(key), str):
            return row[key]
        if key in row and row[key] is None:  # an empty cell
            return ""
    for key in CHAT_KEYS:
        if key in row and not (key == "chosen" and isinstance(row[key], str)):
            return read_messages(row[key], f"{where}, key {key!r},")
    for asked, answered in PAIR_KEYS:
        if isinstance(row.get(asked), str) and isinstance(row.get(answered), str):
            return [
                {"role": "user", "content": asked_of(row, asked)},
                {"role": "assistant", "content": row[answered]},
            ]
    texts = [value for value in row.values() if isinstance(value, str)]
    if len(row) == len(texts) == 1:  # a table of one column: nothing else can be meant
        return texts[0]
    raise PolybitError(f"{where} has the keys {', '.join(map(repr, row)) or 'none'}; {FORMS}.")


def asked_of(row: Mapping[str, Any], key: str) -> str:
    """What a pair asks; Alpaca's `input` is what its `instruction` is about."""
    about = row.get("input") if key == "instruction" else None
    return f"{row[key]}\n\n{about}" if isinstance(about, str) and about.strip() else row[key]


def read_messages(value: Any, where: str) -> Messages:
    """A conversation in the one form, from any of those that are known; anything else is refused."""
    fault = f'{where} must be a list of {{"role": "user", "content": "..."}}'
    if not isinstance(value, list) or not value:
        raise PolybitError(f"{fault}; it is {'an empty list' if value == [] else 'a ' + type(value).__name__}.")
    return [message_of(turn, fault) for turn in value]


def message_of(turn: Any, fault: str) -> dict[str, Any]:
    """One turn in the one form."""
    if not isinstance(turn, Mapping):
        raise PolybitError(f"{fault}; one message has {type(turn).__name__}.")
    for who, what in NAMES:
        role = turn.get(who)
        calls = turn.get("tool_calls") or None
        if isinstance(role, str) and (what in turn or calls):
            content = text_of(turn.get(what), fault, empty=calls is not None)
            if content is None:
                break
            made: dict[str, Any] = {"role": ROLES.get(role.lower(), role), "content": content}
            # tables fill the fields a turn does not have with None
            made |= {key: turn[key] for key in KEPT if turn.get(key)}
            if calls is not None:
                made["tool_calls"] = calls_of(calls, fault)
            return made
    raise PolybitError(f"{fault}; one message has {', '.join(map(repr, turn)) or 'no keys'}.")


def text_of(content: Any, fault: str, *, empty: bool) -> str | None:
    """The text of a message: as it is, or of its parts; None where there is none and the turn may not be `empty`."""
    if content is None:
        return "" if empty else None
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, Mapping) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise PolybitError(f"{fault}; one message has a part of the type {kind!r:.40}, and only texts are read.")
    return "".join(texts)


def calls_of(calls: Any, fault: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as objects, which templates write as JSON, not as a text with JSON in it."""
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise PolybitError(f"{fault}; 'tool_calls' of one message must be a list of objects.")
    made = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise PolybitError(f"{fault}; one of its tool calls has no function with a name.")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):  # what a model once wrote need not be JSON
                arguments = function["arguments"]
        made.append({**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return made


def plain_text(messages: Messages) -> str:
    """A conversation without a chat template: contents and tool calls, one per line."""
    lines = []
    for message in messages:
        if message["content"] or not message.get("tool_calls"):
            lines.append(message["content"])
        for call in message.get("tool_calls", ()):
            lines.append(json.dumps(call["function"], ensure_ascii=False, default=str))
    return "\n".join(lines)
