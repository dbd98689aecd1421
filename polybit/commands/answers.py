"""Answers to judge: which models answer, each generated once, frozen on disk with a seal, resumable in parts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from polybit.core.runtime import PolybitError, atomic_path, write_json
from polybit.hub.models import open_model

SHARD = 16  # questions per file of unfinished work
FLOAT = "float"


@dataclass(frozen=True, slots=True)
class Entrant:
    """One argument of the command line: `[NAME=]MODEL[@PRECISION,...]`, or `NAME=answers.jsonl`."""

    name: str | None
    source: str
    precisions: tuple[str, ...]

    @property
    def is_file(self) -> bool:
        """Whether it is a file of finished answers."""
        return self.source.endswith((".jsonl", ".json"))


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the tables: its answers by question id, and where they came from."""

    name: str
    answers: dict[str, list[str]]
    sha256: str
    dropped: int = 0
    sizes: Mapping[str, Any] | None = None


def parse_entrant(text: str) -> Entrant:
    """Split a command-line argument into name, model and precisions."""
    named = re.fullmatch(r"([\w .+-]+)=(.+)", text)
    name, rest = (named[1].strip(), named[2]) if named else (None, text)
    at = re.fullmatch(r"(.+)@([wakqv\d,]+)", rest)
    source, precisions = (at[1], tuple(filter(None, at[2].split(",")))) if at else (rest, ())
    entrant = Entrant(name, source, precisions)
    if name == FLOAT:
        raise PolybitError(f"the name {FLOAT!r} belongs to the reference: choose another in {text!r}")
    if entrant.is_file and (name is None or precisions):
        raise PolybitError(
            f"a file of answers needs a name and no precision, as in GPT4={Path(source).name}: got {text!r}"
        )
    return entrant


def row_names(entrant: Entrant, precisions: Sequence[str | None], *, alone: bool) -> list[str]:
    """Names of an entrant's rows: its own, the precision, or both where there are several."""
    name = entrant.name or Path(entrant.source).name
    if len(precisions) == 1:
        return [name]
    if alone and entrant.name is None:
        return [str(precision) for precision in precisions]
    return [f"{name} {precision}" for precision in precisions]


def slug(name: str) -> str:
    """A file name for a row."""
    return re.sub(r"[^\w.+-]", "_", name)[:80] + "-" + hashlib.sha256(name.encode()).hexdigest()[:6]


def digest_of(answers: Mapping[str, Sequence[str]]) -> str:
    """sha256 over all answers; equal answers have equal seals."""
    content = json.dumps(sorted((key, list(turns)) for key, turns in answers.items()), ensure_ascii=False)
    return hashlib.sha256(content.encode("utf-8", errors="surrogatepass")).hexdigest()


class Freezer:
    """The answers of a run: `answers/ROW.jsonl` in FastChat's form, and beside it the seal and what decided them."""

    def __init__(self, out: Path, questions: Sequence[Any], *, max_tokens: int, restart: bool) -> None:
        from polybit.evals.judge_questions import questions_digest

        self.folder, self.questions, self.restart = out / "answers", questions, restart
        self.decides = {"questions": questions_digest(questions), "max_tokens": max_tokens}

    def frozen(self, name: str, origin: Mapping[str, Any]) -> Row | None:
        """The finished answers of a row, None when there are none; those of another run are refused."""
        from polybit.evals.judge_questions import read_answers

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
        return Row(name, answers, found["sha256"], found["dropped"], found.get("sizes"))

    def answer(
        self, name: str, origin: Mapping[str, Any], talk: Callable[[list[tuple[str, ...]]], Any], sizes: Any = None
    ) -> Row:
        """Let a model answer what is not answered yet, a part at a time, and freeze the whole."""
        parts = self.folder / f"{slug(name)}.parts"
        wanted = {**self.decides, **origin}
        answers: dict[str, list[str]] = {}
        dropped = 0
        for start in range(0, len(self.questions), SHARD):
            group = self.questions[start : start + SHARD]
            path = parts / f"{start:06d}.json"
            done = None if self.restart else read_part(path, wanted)
            if done is None:
                found = talk([question.turns for question in group])
                done = {
                    "made_from": wanted,
                    "answers": {q.id: texts for q, texts in zip(group, found.texts, strict=True)},
                    "dropped": sum(map(sum, found.dropped)),
                }
                write_json(path, done)
            answers |= done["answers"]
            dropped += done["dropped"]
        return self.keep(Row(name, answers, digest_of(answers), dropped, sizes), wanted, parts)

    def keep(self, row: Row, made_from: Mapping[str, Any], parts: Path) -> Row:
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


def open_reference(entrants: Sequence[Entrant], named: str | None, *, trust_remote_code: bool):
    """The float model the others are compared with: (name, model, tokenizer)."""
    from polybit.compress.sizes import base_model, stored_widths

    name = named
    for entrant in entrants:
        if name is None and not entrant.is_file:
            model, _ = open_model(entrant.source, trust_remote_code=trust_remote_code)
            name = base_model(model) or (entrant.source if stored_widths(model) is None else None)
            del model
    if name is None:
        raise PolybitError("no model says which float model it was made from: name it with --reference")
    model, tokenizer = open_model(name, trust_remote_code=trust_remote_code)
    if stored_widths(model) is not None:
        raise PolybitError(f"the reference {name} is itself quantized: give the float model it was made from")
    return name, model, tokenizer


def gather_rows(
    entrants: Sequence[Entrant],
    freezer: Freezer,
    *,
    precision: str | None,
    max_tokens: int,
    trust_remote_code: bool,
) -> list[Row]:
    """Answers of every entrant at every precision; one model is in memory at a time."""
    from polybit.compress.sizes import default_presets, preset_sizes, stored_widths
    from polybit.evals.conversation import converse
    from polybit.evals.judge_questions import read_answers
    from polybit.hub.lm import LocalLM
    from polybit.hub.workspace import model_digest

    rows: list[Row] = []
    for entrant in entrants:
        if entrant.is_file:
            answers = read_answers(entrant.source)
            rows.append(Row(str(entrant.name), answers, digest_of(answers)))
            continue
        model, tokenizer = open_model(entrant.source, trust_remote_code=trust_remote_code)
        widths, lm = stored_widths(model), LocalLM(model, tokenizer)
        asked = entrant.precisions or tuple(filter(None, (precision or "").split(",")))
        if widths is None and entrant.precisions:
            raise PolybitError(f"{entrant.source} is a float model without stored widths: it has no {asked[0]}")
        presets: list[str | None] = [None] if widths is None else list(asked or default_presets(model))
        sizes = preset_sizes(model, [p for p in presets if p]) if widths else {}
        digest = model_digest(model)
        for name, preset in zip(row_names(entrant, presets, alone=len(entrants) == 1), presets, strict=True):
            origin = {"model": digest, "precision": preset}
            if (row := freezer.frozen(name, origin)) is None:
                with lm.at(preset):
                    row = freezer.answer(
                        name,
                        origin,
                        partial(converse, lm, max_tokens=max_tokens, label=name),
                        sizes.get(preset or ""),
                    )
            rows.append(row)
        del model, lm
    names = [row.name for row in rows]
    if len(set(names)) != len(names):
        raise PolybitError(f"two rows are called {max(names, key=names.count)!r}: name them, as in NAME=MODEL@w3")
    return rows
