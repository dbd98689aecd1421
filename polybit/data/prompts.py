"""Prompts to answer from any source: a file, a table, a named set or a dataset id."""

from __future__ import annotations

from pathlib import Path

from polybit.core.runtime import PolybitError
from polybit.data.chat import Prompt, read_prompts
from polybit.data.text import read_raw
from polybit.data.turns import Messages

WORDS = 12  # of a running text that serve as a prompt


def gather_prompts(source: str, *, chat: bool, limit: int | None = None) -> list[Prompt]:
    """Prompts of a file (of a table the column of questions), a named set, or a dataset id.

    With `chat` plain text becomes a user's message. Of a conversation every user turn is a prompt, what was said
    before it included. Running text that is no conversation gives the first words of each of its paragraphs.
    Raises PolybitError for a source that cannot be read or holds no prompt.
    """
    path = Path(source)
    if path.is_file():
        found = read_prompts(path, chat=chat)
    else:
        found = []
        for document in read_raw(source):
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
