"""Prompts to answer from any source: a file, a table, a named set or a dataset id."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from polybit.core.runtime import PolybitError
from polybit.data.chat import Prompt, as_prompt, read_prompts
from polybit.data.text import Messages, _read_source, read_utf8

COLUMNS = ("prompt", "question", "instruction", "text", "q")
WORDS = 12  # of a running text that serve as a prompt


def gather_prompts(source: str, *, chat: bool, limit: int | None = None) -> list[Prompt]:
    """Prompts of a .txt or .jsonl file, a .csv or .tsv with a column of questions, a named set, or a dataset id.

    With `chat` plain text becomes a user's message. Of a conversation every user turn is a prompt, what was said
    before it included. Running text that is no conversation gives the first words of each of its paragraphs.
    Raises PolybitError for a source that cannot be read or holds no prompt.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if path.is_file() and suffix in (".csv", ".tsv"):
        found = read_table(path, chat=chat)
    elif path.is_file():
        found = read_prompts(path, chat=chat)
    else:
        found = []
        for document in _read_source(source, path):
            found += beginnings(document) if isinstance(document, str) else user_turns(document)
            if limit is not None and len(found) >= limit:
                break
    if not found:
        raise PolybitError(f"Prompts {source!r} hold nothing to answer; give at least one prompt.")
    return found[:limit]


def user_turns(messages: Messages) -> list[Prompt]:
    """The conversation up to each user message."""
    return [messages[: turn + 1] for turn, message in enumerate(messages) if message["role"] == "user"]


def beginnings(text: str) -> list[Prompt]:
    """The first words of each paragraph, to be continued; short paragraphs are left out."""
    rows = [line.split() for line in text.splitlines()]
    return [" ".join(words[:WORDS]) for words in rows if len(words) > WORDS]


def read_table(path: Path, *, chat: bool) -> list[Prompt]:
    """One prompt per row of a table, from the first column with a name that means a prompt."""
    rows: list[dict[str, Any]] = list(
        csv.DictReader(read_utf8(path).splitlines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
    )
    names = {str(name).strip().lower(): name for name in (rows[0] if rows else {})}
    column = next((names[name] for name in COLUMNS if name in names), None)
    if column is None:
        raise PolybitError(
            f"Prompt file {str(path)!r} has the columns {', '.join(names) or 'none'}; name one of them "
            f"{', '.join(COLUMNS[:-1])} or Q."
        )
    return [as_prompt(str(row[column]).strip(), chat=chat) for row in rows if row[column] and str(row[column]).strip()]
