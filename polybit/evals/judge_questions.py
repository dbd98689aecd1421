"""Questions for judged evaluation with their reference answers and skills: MT-Bench, Vicuna-80, KoMT-Bench, FLASK."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polybit.core.runtime import PolybitError
from polybit.data.rows import read_rows

# name -> dataset on the hub, for those that are published there
HUB_QUESTIONS = {"mt-bench": "HuggingFaceH4/mt_bench_prompts::train", "komt-bench": "LGAI-EXAONE/KoMT-Bench::train"}
TURN_KEYS = ("turns", "prompt", "instruction", "question", "text")
ID_KEYS = ("question_id", "prompt_id", "idx", "id")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: one text per turn of the user; `references` are good answers turn by turn, where there are any.

    skills: the FLASK skills an answer is graded for.
    """

    id: str
    turns: tuple[str, ...]
    category: str = "general"
    references: tuple[str, ...] = ()
    skills: tuple[str, ...] = ()


def read_questions(source: str | Path, *, references: str | Path | None = None) -> list[Question]:
    """Questions from a file, a dataset id or a name of HUB_QUESTIONS; `references` is a file of answers by question_id.

    A row has "turns" (a list), or one text under "prompt", "instruction", "question" or "text".
    """
    rows = read_rows(HUB_QUESTIONS.get(str(source), source), split="train")
    found = [_question(row, n, str(source)) for n, row in enumerate(rows, start=1)]
    ids = [question.id for question in found]
    if len(set(ids)) != len(ids):
        raise PolybitError(f"{str(source)!r} has {len(ids) - len(set(ids))} repeated question ids; make them unique.")
    if references is not None:
        given = read_answers(references)
        if not given.keys() & set(ids):
            raise PolybitError(
                f"No reference answer in {str(references)!r} has the id of a question; give the right file."
            )
        found = [replace(q, references=tuple(given[q.id])) if q.id in given else q for q in found]
    return found


def _question(row: Mapping[str, Any], number: int, source: str) -> Question:
    turns = next((_texts(row[key]) for key in TURN_KEYS if _texts(row.get(key))), ())
    if not turns:
        raise PolybitError(
            f"Row {number} of {source!r} has {', '.join(map(repr, row)) or 'no fields'}; a question needs "
            '"turns" (a list of texts) or one text under "prompt", "instruction", "question" or "text".'
        )
    name = next((str(row[key]) for key in ID_KEYS if row.get(key) is not None), str(number))
    references = next((_texts(row[key]) for key in ("reference", "answer") if _texts(row.get(key))), ())
    category = row.get("category") or row.get("task") or "general"
    return Question(name, turns, str(category), references, _texts(row.get("skill") or row.get("skills")))


def _texts(value: Any) -> tuple[str, ...]:
    """A text or a list of texts as a tuple; anything else is empty."""
    if isinstance(value, str):
        return (value,) if value.strip() else ()
    if isinstance(value, Sequence) and value and all(isinstance(text, str) for text in value):
        return tuple(value)
    return ()


def read_answers(source: str | Path) -> dict[str, list[str]]:
    """Answers by question id, a text per turn: FastChat's answer files, or rows with one "text" (Vicuna, FLASK)."""
    found: dict[str, list[str]] = {}
    for number, row in enumerate(read_rows(source), start=1):
        choices = row.get("choices")
        turns = choices[0].get("turns") if isinstance(choices, list) and choices else [row.get("text")]
        name = next((str(row[key]) for key in ID_KEYS if row.get(key) is not None), None)
        if name is None or not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise PolybitError(
                f'Row {number} of {str(source)!r} is no answer; write {{"question_id", "choices": [{{"turns": '
                '[...]}]} or {"question_id", "text"}.'
            )
        found[name] = turns
    return found


def questions_digest(questions: Sequence[Question]) -> str:
    """sha256 of what the model is asked (not of references or skills, which it never sees)."""
    content = json.dumps([[question.id, question.turns] for question in questions], ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", errors="surrogatepass")).hexdigest()
