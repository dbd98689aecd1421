"""Token rows to train on, each with the tokens that are to be learnt: running text, conversations, questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from polybit.core.runtime import PolybitError
from polybit.data.batches import pad
from polybit.data.chat import encode_conversation, encode_prompt
from polybit.data.files import read_utf8
from polybit.data.stream import encode, token_stream
from polybit.data.table import EMBEDDED_SETS
from polybit.data.text import has_chat_template, read_corpus, read_raw
from polybit.data.text import windows as cut_windows
from polybit.data.turns import Messages, plain_text


@dataclass(frozen=True, slots=True)
class Lesson:
    """Token ids, and for each whether the model has to say it."""

    ids: list[int]
    learn: list[bool]


@dataclass(frozen=True, slots=True)
class Lessons:
    """Rows to train on; `too_long` counts those left out because they do not fit, which are never cut."""

    rows: list[Lesson]
    too_long: int = 0
    source: str = ""

    def split(self, held_out: int, *, seed: int = 0) -> tuple[Lessons, Lessons]:
        """(rows to train on, held-out rows) after one shuffle."""
        order = list(range(len(self.rows)))
        Random(seed).shuffle(order)
        if len(order) <= held_out:
            raise PolybitError(
                f"{len(order)} rows of {self.source!r} cannot give {held_out} held-out ones and some to train on; "
                "add more."
            )
        parts = order[held_out:], order[:held_out]
        first, last = (Lessons([self.rows[i] for i in part], self.too_long, self.source) for part in parts)
        return first, last


def batch(rows: Sequence[Lesson], fill: int) -> dict[str, Tensor]:
    """ids_BT padded on the right, mask_BT (1 at real tokens), learn_BT (True at the tokens that are to be said)."""
    ids_BT, mask_BT = pad([row.ids for row in rows], fill)
    learn_BT = torch.zeros_like(mask_BT)
    for index, row in enumerate(rows):
        learn_BT[index, : len(row.learn)] = torch.tensor(row.learn)
    return {"ids_BT": ids_BT, "mask_BT": mask_BT.long(), "learn_BT": learn_BT}


def read_lessons(source: str, tokenizer: Any, *, length: int, count: int | None = None, seed: int = 0) -> Lessons:
    """Rows from a file or a named set: a SQuAD .json (the answer and its end are learnt), conversations or pairs (what
    the assistant says), `embedded` (conversations of our generator, drawn anew for each seed), or plain text (all of
    it, in windows of `length` tokens). Rows longer than `length` are left out and counted, never cut.
    """
    if is_squad(Path(source)):
        return gather(squad_lessons(source, tokenizer, count=count, seed=seed), length, source)
    if source in EMBEDDED_SETS:
        from polybit.data import synth

        split, base = EMBEDDED_SETS[source]
        talks = synth.conversations(count or 800, base + 1000 * (seed + 1), split=split)
        return gather([conversation_lesson(talk, tokenizer) for talk in talks], length, source)
    raw = read_raw(source)
    talks = [document for document in raw if not isinstance(document, str)]
    if talks:
        return gather([conversation_lesson(talk, tokenizer) for talk in _draw(talks, count, seed)], length, source)
    corpus = read_corpus(source, tokenizer)
    stream = token_stream(tokenizer, corpus.documents, separator=corpus.separator)
    rows_NT = cut_windows(stream, length, bos=tokenizer.bos_token_id, count=count, seed=seed)
    return Lessons([Lesson(row, [True] * len(row)) for row in rows_NT.tolist()], 0, source)


def is_squad(path: Path) -> bool:
    """Whether a file is one JSON object, as SQuAD's are, and not a list of rows."""
    return path.suffix.lower() == ".json" and not (path.is_file() and read_utf8(path).lstrip()[:1] == "[")


def _draw(items: Sequence[Any], count: int | None, seed: int) -> list[Any]:
    """All items in order, or `count` of them at random."""
    return list(items) if count is None or count >= len(items) else Random(seed).sample(list(items), count)


def gather(rows: Sequence[Lesson | None], length: int, source: str) -> Lessons:
    """The rows that fit and have something to learn."""
    there = [row for row in rows if row is not None and any(row.learn)]
    if not there:
        raise PolybitError(
            f"{source!r} has no answers to learn from; give conversations, pairs or questions with answers."
        )
    fitting = [row for row in there if len(row.ids) <= length]
    if not fitting:
        raise PolybitError(
            f"All {len(there)} rows of {source!r} are longer than {length} tokens (the shortest has "
            f"{min(len(row.ids) for row in there)}); raise --length, or give shorter texts: a question is never cut."
        )
    return Lessons(fitting, len(there) - len(fitting), source)


def conversation_lesson(messages: Messages, tokenizer: Any) -> Lesson:
    """A conversation of which the assistant's words and their ends are learnt; without a template, its last message."""
    if has_chat_template(tokenizer):
        return Lesson(*encode_conversation(tokenizer, messages))
    *before, last = messages
    return answer_lesson(f"{plain_text(before)}\n" if before else "", last["content"], tokenizer)


def squad_lessons(source: str, tokenizer: Any, *, count: int | None, seed: int) -> list[Lesson | None]:
    """Questions whose first answer and its end are learnt, asked as evaluation asks them; None where none is right."""
    from polybit.data.spans import filler
    from polybit.data.squad import SquadFile

    file = SquadFile(Path(source))
    answers, fill = file.answers(), filler(tokenizer)
    found: list[Lesson | None] = []
    for one in _draw(file.questions(), count, seed):
        right = answers[one.id]
        prompt = fill(one.context, one.question)
        if not right:
            found.append(None)
        elif isinstance(prompt, str):
            found.append(answer_lesson(prompt, f" {right[0].text}", tokenizer))
        else:
            found.append(conversation_lesson([*prompt, {"role": "assistant", "content": right[0].text}], tokenizer))
    return found


def answer_lesson(prompt: str, answer: str, tokenizer: Any) -> Lesson:
    """A text and its continuation, of which the continuation and the end-of-text token are learnt."""
    before, after = encode_prompt(tokenizer, prompt), encode(tokenizer, answer).tolist()
    if tokenizer.eos_token_id is not None:
        after.append(tokenizer.eos_token_id)
    return Lesson([*before, *after], [False] * len(before) + [True] * len(after))
