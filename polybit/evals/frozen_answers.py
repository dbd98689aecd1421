"""Answers to judge, each generated once: frozen on disk with a seal, and resumable in parts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polybit.core.runtime import PolybitError, atomic_path, write_json
from polybit.evals.judge_questions import Question, questions_digest, read_answers

SHARD = 16  # questions per file of unfinished work
FLOAT = "float"  # the row of the reference
Scripts = list[tuple[str, ...]]  # the user's turns of each question
Talks = Callable[[list[Scripts]], Iterable[tuple[int, Any]]]  # parts -> (number, Talk) of each, in any order


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """One row of the tables: its answers by question id, and where they came from."""

    name: str
    answers: dict[str, list[str]]
    sha256: str
    dropped: int = 0
    sizes: Mapping[str, Any] | None = None


def slug(name: str) -> str:
    """A file name for a row."""
    return re.sub(r"[^\w.+-]", "_", name)[:80] + "-" + hashlib.sha256(name.encode()).hexdigest()[:6]


def digest_of(answers: Mapping[str, Sequence[str]]) -> str:
    """sha256 over all answers; equal answers have equal seals."""
    content = json.dumps(sorted((key, list(turns)) for key, turns in answers.items()), ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", errors="surrogatepass")).hexdigest()


class Freezer:
    """The answers of a run: `answers/ROW.jsonl` in FastChat's form, and beside it the seal and what decided them."""

    def __init__(self, out: Path, questions: Sequence[Question], *, max_tokens: int, restart: bool) -> None:
        self.folder, self.questions, self.restart = out / "answers", questions, restart
        self.decides = {"questions": questions_digest(questions), "max_tokens": max_tokens}

    def frozen(self, name: str, origin: Mapping[str, Any]) -> AnswerRow | None:
        """The finished answers of a row, None when there are none; those of another run are refused."""
        seal = self.folder / f"{slug(name)}.json"
        if self.restart or not seal.is_file():
            return None
        found = json.loads(seal.read_text(encoding="utf-8"))
        wanted = {**self.decides, **origin}
        for key in wanted:
            if found["made_from"].get(key) != wanted[key]:
                raise PolybitError(
                    f"the answers of {name!r} in {self.folder} were made from another {key}: use another --out, or "
                    "--restart to answer again"
                )
        answers = read_answers(seal.with_suffix(".jsonl"))
        if digest_of(answers) != found["sha256"]:
            raise PolybitError(
                f"{seal.with_suffix('.jsonl')} was changed after the answers were made: --restart answers again"
            )
        return AnswerRow(name, answers, found["sha256"], found["dropped"], found.get("sizes"))

    def answer(self, name: str, origin: Mapping[str, Any], talk: Talks, sizes: Any = None) -> AnswerRow:
        """Have what is not answered yet answered, a part at a time, and freeze the whole."""
        parts = self.folder / f"{slug(name)}.parts"
        wanted = {**self.decides, **origin}
        groups = {start: self.questions[start : start + SHARD] for start in range(0, len(self.questions), SHARD)}
        paths = {start: parts / f"{start:06d}.json" for start in groups}
        done = {start: None if self.restart else read_part(path, wanted) for start, path in paths.items()}
        missing = [start for start, part in done.items() if part is None]
        for number, found in talk([[question.turns for question in groups[start]] for start in missing]):
            start = missing[number]
            done[start] = {
                "made_from": wanted,
                "answers": {q.id: texts for q, texts in zip(groups[start], found.texts, strict=True)},
                "dropped": sum(map(sum, found.dropped)),
            }
            write_json(paths[start], done[start])
        finished = [part for part in done.values() if part is not None]
        answers = {name: texts for part in finished for name, texts in part["answers"].items()}
        dropped = sum(part["dropped"] for part in finished)
        return self.keep(AnswerRow(name, answers, digest_of(answers), dropped, sizes), wanted, parts)

    def keep(self, row: AnswerRow, made_from: Mapping[str, Any], parts: Path) -> AnswerRow:
        """Write the whole and its seal, and remove the parts."""
        path = self.folder / f"{slug(row.name)}.jsonl"
        lines = [
            {"question_id": name, "model_id": row.name, "choices": [{"index": 0, "turns": turns}]}
            for name, turns in row.answers.items()
        ]
        with atomic_path(path) as staged:
            staged.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        made = {"name": row.name, "made_from": dict(made_from), "sha256": row.sha256}
        write_json(path.with_suffix(".json"), {**made, "dropped": row.dropped, "sizes": row.sizes})
        for part in parts.glob("*.json"):
            part.unlink()
        if parts.is_dir():
            parts.rmdir()
        return row


def read_part(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any] | None:
    """A finished part of the same run."""
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return found if found["made_from"] == wanted else None
