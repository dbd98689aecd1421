"""An answer while it is written: tokens in as transformers' streamers get them, whole characters out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from polybit.serve.writing import Writer

Say = Callable[[str], None]


class Heard:
    """Joined, what is said is the answer without blanks at its ends."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], say: Say) -> None:
        self.writer, self.say = Writer(tokenizer, prompt), say
        self.tokens: list[int] = []
        self.blanks: str | None = None  # held back until a word follows; None before the first word

    def put(self, value: Tensor) -> None:
        """The next token; the prompt, which transformers hands over first, is passed over."""
        if value.ndim > 1:
            return
        self.tokens += [int(token) for token in value]
        for token in value:
            self.pass_on(self.writer.add(int(token)))

    def end(self) -> None:
        """Nothing more comes."""
        self.pass_on(self.writer.finish())

    def pass_on(self, text: str) -> None:
        """Say a piece, but for blanks before and after the answer."""
        if self.blanks is None:
            text = text.lstrip()
            if not text:
                return
            self.blanks = ""
        kept = text.rstrip()
        if kept:
            self.say(self.blanks + kept)
            self.blanks = text[len(kept) :]
        else:
            self.blanks += text
