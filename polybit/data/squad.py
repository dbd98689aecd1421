"""Reading comprehension files: SQuAD 1.1, SQuAD 2.0 and KorQuAD 1/2; questions and answers are read apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from polybit.core.runtime import PolybitError, write_json
from polybit.data.files import parse_json, read_utf8
from polybit.data.table import EMBEDDED

READING_ITEMS, READING_SEED = 500, 30_000  # of the embedded reading task, where questions are evaluated


@dataclass(frozen=True, slots=True)
class Asked:
    """A question and the text that may answer it, without the answer: all a model ever sees."""

    id: str
    context: str
    question: str


@dataclass(frozen=True, slots=True)
class Answer:
    """One right answer and where it begins in the context (-1 = not said)."""

    text: str
    start: int = -1


@dataclass(frozen=True, slots=True)
class SquadFile:
    """A file of questions. `questions` gives no answer away; `answers` reads the file again."""

    path: Path

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.path.name

    def questions(self) -> list[Asked]:
        """All questions in the order of the file."""
        found = [Asked(*entry[:3]) for entry in entries(self.path)]
        repeated = len(found) - len({asked.id for asked in found})
        if repeated:
            raise PolybitError(f"{self.path} repeats the id of {repeated} questions: give every question its own id")
        return found

    def answers(self) -> dict[str, tuple[Answer, ...]]:
        """Right answers by question id; an empty tuple where the file says that the text holds none."""
        found: dict[str, tuple[Answer, ...]] = {}
        missing = []
        for name, _, _, row in entries(self.path):
            found[name] = read_answers(row)
            if not found[name] and not row.get("is_impossible", False):
                missing.append(name)
        if missing:
            raise PolybitError(
                f"{len(missing)} of {len(found)} questions of {self.path} have no answer, first {missing[0]!r:.60}: "
                "give a file with 'answers', or mark the question 'is_impossible' as SQuAD 2.0 does"
            )
        return found

    def version(self) -> str:
        """The version the file declares."""
        return str(load(self.path).get("version", ""))


def load(path: Path) -> Mapping[str, Any]:
    """The JSON of a file, refused when it is no SQuAD layout."""
    if not path.is_file():
        raise PolybitError(f"{path} does not exist or is no file: give a SQuAD .json file")
    value = parse_json(read_utf8(path), str(path), "a SQuAD file")
    if not isinstance(value, dict) or not isinstance(value.get("data"), list):
        raise PolybitError(f'{path} has no list "data": give a file in the layout of SQuAD or KorQuAD')
    return value


def entries(path: Path) -> Iterator[tuple[str, str, str, Mapping[str, Any]]]:
    """(id, context, question, the whole row) of every question."""
    count = 0
    for number, article in enumerate(load(path)["data"]):
        # KorQuAD 2 has one long context per article in place of paragraphs
        paragraphs = article.get("paragraphs", [article]) if isinstance(article, dict) else None
        if not isinstance(paragraphs, list):
            raise PolybitError(f"article {number + 1} of {path} is {article!r:.60}: it needs 'paragraphs'")
        for paragraph in paragraphs:
            whole = paragraph if isinstance(paragraph, dict) else {}
            context, rows = whole.get("context"), whole.get("qas")
            if not isinstance(context, str) or not isinstance(rows, list):
                raise PolybitError(f"a paragraph of article {number + 1} of {path} lacks 'context' or 'qas'")
            for row in rows:
                if not isinstance(row, dict) or not isinstance(row.get("question"), str) or "id" not in row:
                    raise PolybitError(f"a question of article {number + 1} of {path} lacks 'id' or 'question'")
                count += 1
                yield str(row["id"]), context, row["question"].strip(), row
    if not count:
        raise PolybitError(f"{path} holds no question: give a SQuAD file with at least one")


def read_answers(row: Mapping[str, Any]) -> tuple[Answer, ...]:
    """The answers of one question: 'answers' (SQuAD, KorQuAD 1) or one 'answer' (KorQuAD 2)."""
    if row.get("is_impossible"):
        return ()
    rows = row.get("answers")
    if rows is None:
        rows = [row["answer"]] if isinstance(row.get("answer"), dict) else []
    if isinstance(rows, dict):  # the columns of the datasets library
        rows = [{"text": t, "answer_start": s} for t, s in zip(rows["text"], rows["answer_start"], strict=True)]
    return tuple(Answer(str(a["text"]), int(a.get("answer_start", -1))) for a in rows)


def choose(asked: Sequence[Asked], count: int | None, seed: int = 0) -> list[Asked]:
    """`count` of the questions drawn at random, in the order of the file; all of them with None."""
    if count is None or count >= len(asked):
        return list(asked)
    chosen = sorted(Random(seed).sample(range(len(asked)), count))
    return [asked[index] for index in chosen]


def write_squad(path: Path, items: Sequence[Any], *, version: str = "1.1") -> SquadFile:
    """Write reading items of the embedded generator (polybit.data.synth) as a SQuAD file."""
    paragraphs = []
    for item in items:
        answers = item.extras["answers"]
        rows = [{"text": t, "answer_start": s} for t, s in zip(answers["text"], answers["answer_start"], strict=True)]
        row = {"id": item.id, "question": item.extras["question"], "answers": rows}
        paragraphs.append({"context": item.extras["passage"], "qas": [row]})
    write_json(path, {"version": version, "data": [{"title": "reading", "paragraphs": paragraphs}]})
    return SquadFile(path)


def open_squad(
    source: str,
    folder: Path,
    *,
    count: int | None = None,
    seed: int = READING_SEED,
    split: Literal["train", "test"] = "test",
) -> SquadFile:
    """The questions of a file; for `embedded`, `count` of our generator's reading task, written to `folder`."""
    if source != EMBEDDED:
        return SquadFile(Path(source))
    from polybit.data import synth

    return write_squad(folder / "embedded.json", synth.items("reading", count or READING_ITEMS, seed, split))
