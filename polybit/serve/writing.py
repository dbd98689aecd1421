"""Tokens to text while they come: whole characters only, and nothing that may be the beginning of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

BEFORE = 4  # tokens decoded before the new ones, for decoders that treat the first of all tokens differently
BROKEN = "\ufffd"  # what a decoder writes for the first bytes of a character


class Writer:
    """The text of one answer, piece by piece; joined, the pieces are the whole text cut before the first stop text."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.decode, self.stop = decoder_of(tokenizer), [text for text in stop if text]
        self.context = list(prompt)[-BEFORE:]
        self.tokens: list[int] = []  # not yet written
        self.waiting = ""  # decoded, held back while it may begin a stop text
        self.stopped_by: str | None = None

    def add(self, token: int) -> str:
        """The text that is certain once this token has come."""
        self.tokens.append(token)
        text = self.decoded()
        if text.endswith(BROKEN) and len(self.tokens) < 16:  # a character has few tokens: what stays broken is broken
            return ""
        self.context = [*self.context, *self.tokens][-BEFORE:]
        self.tokens = []
        return self.release(text)

    def finish(self) -> str:
        """What was held back."""
        text, self.tokens = (self.decoded(), []) if self.tokens else ("", [])
        if self.stopped_by is not None:
            return ""
        found = self.release(text)
        rest, self.waiting = (self.waiting, "") if self.stopped_by is None else ("", "")
        return found + rest

    def decoded(self) -> str:
        """The text of the new tokens after those before them; special tokens are left out."""
        before = self.decode(self.context)
        text = self.decode([*self.context, *self.tokens])
        return text[len(before) :] if text.startswith(before) else self.decode(self.tokens)

    def release(self, text: str) -> str:
        """Text up to a stop text, or up to where one may have begun."""
        if not self.stop:
            return text
        self.waiting += text
        ends = [(self.waiting.find(mark), mark) for mark in self.stop if mark in self.waiting]
        if ends:
            at, self.stopped_by = min(ends)
            found, self.waiting = self.waiting[:at], ""
            return found
        keep = max((overlap(self.waiting, mark) for mark in self.stop), default=0)
        at = len(self.waiting) - keep
        found, self.waiting = self.waiting[:at], self.waiting[at:]
        return found


def overlap(text: str, mark: str) -> int:
    """The longest end of `text` that is a beginning of `mark`, in characters."""
    for size in range(min(len(text), len(mark) - 1), 0, -1):
        if mark.startswith(text[-size:]):
            return size
    return 0


def decoder_of(tokenizer: Any) -> Callable[[list[int]], str]:
    """Tokens to text without special ones; straight to the library behind a tokenizer where that says the same."""
    library = getattr(tokenizer, "backend_tokenizer", None)
    if library is None or getattr(tokenizer, "clean_up_tokenization_spaces", True):
        return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)
    return lambda tokens: library.decode(tokens, skip_special_tokens=True)
