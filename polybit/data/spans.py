"""Question and context as token windows for a span head, and for a prompt: the question is always whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from polybit.core.runtime import PolybitError
from polybit.data.chat import Prompt, encode_prompt
from polybit.data.squad import Answer, Asked
from polybit.data.text import has_chat_template

LEAST_CONTEXT = 16  # tokens of context a window must have room for
Fill = Callable[[str, str], Prompt]


@dataclass(frozen=True, slots=True)
class Window:
    """One window of a question: token ids, and for each token where it lies in the context (None outside it)."""

    asked: int
    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int] | None, ...]


def span_windows(tokenizer: Any, asked: Sequence[Asked], *, length: int = 384, stride: int = 128) -> list[Window]:
    """Windows of at most `length` tokens, question first, that overlap by `stride` tokens of context.

    Raises PolybitError for a question that leaves no room: it is never cut.
    """
    found = []
    for number, one in enumerate(asked):
        question = len(tokenizer(one.question, "", verbose=False)["input_ids"])
        overlap = stride
        if question + LEAST_CONTEXT > length:
            raise too_long(one, question, length)
        if question + overlap >= length:
            overlap = (length - question) // 2
        encoded = tokenizer(
            one.question,
            one.context,
            truncation="only_second",
            max_length=length,
            stride=overlap,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            verbose=False,
        )
        for row, ids in enumerate(encoded["input_ids"]):
            side = encoded.sequence_ids(row)
            places = encoded["offset_mapping"][row]
            offsets = tuple(
                (int(p[0]), int(p[1])) if s == 1 and p[1] > p[0] else None for s, p in zip(side, places, strict=True)
            )
            found.append(Window(number, tuple(ids), offsets))
    return found


def span_targets(windows: Sequence[Window], asked: Sequence[Asked], answers: Mapping[str, Sequence[Answer]]) -> list:
    """(first token, last token) of the first answer in each window; (0, 0) where the window does not hold it."""
    found = []
    for window in windows:
        one = asked[window.asked]
        first = next(iter(answers[one.id]), None)
        start = -1 if first is None else first.start if first.start >= 0 else one.context.find(first.text)
        stop = start + (len(first.text) if first else 0)
        inside = [n for n, place in enumerate(window.offsets) if place and place[0] < stop and place[1] > start >= 0]
        whole = inside and window.offsets[inside[0]][0] <= start and window.offsets[inside[-1]][1] >= stop  # type: ignore
        found.append((inside[0], inside[-1]) if whole else (0, 0))
    return found


def plain_prompt(context: str, question: str) -> Prompt:
    """A prompt for a model that continues text."""
    return f"Context: {context}\nQuestion: {question}\nAnswer:"


def chat_prompt(context: str, question: str) -> Prompt:
    """A prompt for a chat model: the text, then the question on a line of its own."""
    return [{"role": "user", "content": f"{context}\n{question}"}]


def filler(tokenizer: Any) -> Fill:
    """The way this tokenizer's model is asked."""
    return chat_prompt if has_chat_template(tokenizer) else plain_prompt


def prompt_windows(tokenizer: Any, one: Asked, *, room: int | None, stride: int = 128) -> list[list[int]]:
    """Token ids of one prompt, or of several when the text is longer than `room` tokens allow.

    The windows of context overlap by `stride` tokens; every one holds the whole question.
    Raises PolybitError for a question that leaves no room.
    """
    fill = filler(tokenizer)
    whole = encode_prompt(tokenizer, fill(one.context, one.question))
    if room is None or len(whole) <= room:
        return [whole]
    bare = len(encode_prompt(tokenizer, fill("", one.question)))
    space = room - bare - 4  # tokens may join differently at the seams
    if space < LEAST_CONTEXT:
        raise too_long(one, bare, room)
    places = tokenizer(one.context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = places["offset_mapping"]
    found, start, overlap = [], 0, min(stride, space // 2)
    while True:
        stop = min(len(offsets), start + space)
        while True:
            ids = encode_prompt(tokenizer, fill(one.context[offsets[start][0] : offsets[stop - 1][1]], one.question))
            if len(ids) <= room:
                break
            stop -= len(ids) - room
        found.append(ids)
        if stop >= len(offsets):
            return found
        start = max(start + 1, stop - overlap)


def too_long(one: Asked, tokens: int, room: int) -> PolybitError:
    """The sentence for a question without room for its text."""
    return PolybitError(
        f"question {one.id!r:.60} takes {tokens} of {room} tokens, which leaves no room for its text, and it is never "
        "cut: use a model with a longer context, or a longer window"
    )
