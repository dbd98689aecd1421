"""Tasks in: questions with their answers from a file or a named set, as tokens of which the answer's are marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from polybit.core.runtime import PolybitError
from polybit.data.chat import encode_conversation
from polybit.data.rows import read_rows
from polybit.data.stream import encode
from polybit.data.table import EMBEDDED_TASKS, HUB_TASKS
from polybit.data.text import has_chat_template
from polybit.data.turns import CHAT_KEYS, PAIR_KEYS, Messages, asked_of, first_answer, plain_text, read_messages

LEAST = 8  # items below which a ranking of layers is guesswork
FORMS = (
    'use {"question", "answer"}, {"messages": [..., {"role": "assistant", ...}]} or SQuAD\'s {"context", "question", '
    '"answers"}'
)


@dataclass(frozen=True, slots=True)
class Exchange:
    """A conversation up to the user's question, and the reply wanted: rationale and answer."""

    asked: tuple[dict[str, str], ...]
    answer: str


@dataclass(frozen=True, slots=True)
class TaskText:
    """The items of one task, and what the caller should be told."""

    name: str
    exchanges: list[Exchange]
    warnings: list[str]


def read_task(source: str, *, count: int | None = None, seed: int = 0) -> TaskText:
    """Read the items of a task: a .jsonl/.json/.csv file, a named set (reading, arithmetic, dialogue, gsm8k, squad) or
    a dataset id.

    A row is a question with its answer (GSM8K), a conversation that ends with the assistant, or SQuAD's context,
    question and answers (flat, or the official nested file). `count` items are drawn where there are more.
    Raises PolybitError for a source without items, and names the first row without an answer.
    """
    if source in EMBEDDED_TASKS:
        from polybit.data import synth

        drawn = synth.items(source, count or 256, seed, split="train")
        return TaskText(source, [Exchange(tuple(item.messages), item.answer) for item in drawn], [])
    rows = read_rows(HUB_TASKS.get(source, source), split="train")
    found = [exchange for at, row in enumerate(rows, start=1) for exchange in read_row(row, f"Row {at} of {source!r}")]
    if not found:
        raise PolybitError(f"{source!r} has no question with an answer; {FORMS}.")
    if count is not None and count < len(found):
        found = Random(seed).sample(found, count)
    warnings = []
    if len(found) < LEAST:
        warnings.append(
            f"{source!r} has only {len(found)} items; rankings of layers will be unsure, give {LEAST} or more"
        )
    name = Path(source).name if Path(source).exists() else source
    return TaskText(name, found, warnings)


def read_row(row: dict[str, Any], where: str) -> list[Exchange]:
    """The exchanges of one row: one, or many for SQuAD's nested articles."""
    if isinstance(row.get("data"), list) or isinstance(row.get("paragraphs"), list):
        return read_articles(row, where)
    for key in CHAT_KEYS:
        if key in row:
            return [from_messages(read_messages(row[key], f"{where}, key {key!r},"), where)]
    if "context" in row and "question" in row:
        return [from_squad(str(row["context"]), row, where)]
    for asked, answered in PAIR_KEYS:
        if asked in row and answered in row:
            question = asked_of(row, asked) if isinstance(row[asked], str) else row[asked]
            return [pair(question, row[answered], where)]
    found = ", ".join(map(repr, row)) or "no keys"
    raise PolybitError(f"{where} has {found} and no answer; {FORMS}.")


def pair(question: Any, answer: Any, where: str) -> Exchange:
    """A question and its answer, both texts."""
    if not isinstance(question, str) or not isinstance(answer, str) or not answer.strip():
        raise PolybitError(
            f"{where} has no answer in words ({answer!r:.40}); give every question a text as its answer."
        )
    return Exchange(({"role": "user", "content": question},), answer)


def from_messages(messages: Messages, where: str) -> Exchange:
    """A conversation up to its last user message, and the assistant's reply to it."""
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or not messages[-1]["content"].strip():
        raise PolybitError(f"{where} does not end with an answer of the assistant; add it as the last message.")
    return Exchange(tuple(messages[:-1]), messages[-1]["content"])


def from_squad(context: str, row: dict[str, Any], where: str) -> Exchange:
    """A passage and a question about it; the first of SQuAD's answers."""
    return pair(f"{context}\n{row['question']}", first_answer(row), where)


def read_articles(value: dict[str, Any], where: str) -> list[Exchange]:
    """The official SQuAD file: data > paragraphs > qas; questions marked impossible are left out."""
    found = []
    for article in value.get("data", [value]):
        for paragraph in article.get("paragraphs", []) if isinstance(article, dict) else []:
            for row in paragraph.get("qas", []):
                if not row.get("is_impossible"):
                    found.append(
                        from_squad(str(paragraph.get("context", "")), row, f"{where}, question {row.get('id')!r}")
                    )
    return found


def encode_exchange(tokenizer: Any, exchange: Exchange, *, most: int | None = None) -> tuple[list[int], list[bool]]:
    """Token ids of question and answer, and which of them the answer wrote (its EOS included).

    With a chat template the last assistant turn counts; without one the text is the contents, one per line. More than
    `most` tokens lose their beginning, so that the answer stays.
    """
    messages = [*exchange.asked, {"role": "assistant", "content": exchange.answer}]
    if has_chat_template(tokenizer):
        ids, marks = encode_conversation(tokenizer, messages)
        last = len(marks)
        while last and not marks[last - 1]:
            last -= 1
        first = last
        while first and marks[first - 1]:
            first -= 1
        marks = [first <= at < last for at in range(len(ids))]
    else:
        question = plain_text(list(exchange.asked)) + "\n"
        before, after = encode(tokenizer, question).tolist(), encode(tokenizer, exchange.answer).tolist()
        bos = tokenizer.bos_token_id
        before = before if bos is None else [bos, *before]
        ids, marks = before + after, [False] * len(before) + [True] * len(after)
    return (ids, marks) if most is None else (ids[-most:], marks[-most:])


def encode_task(
    tokenizer: Any, task: TaskText | Sequence[Exchange], *, most: int | None = None
) -> list[tuple[list[int], list[bool]]]:
    """All items of a task as `encode_exchange` gives them."""
    exchanges = task.exchanges if isinstance(task, TaskText) else task
    return [encode_exchange(tokenizer, exchange, most=most) for exchange in exchanges]
