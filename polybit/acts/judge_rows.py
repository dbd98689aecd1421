"""The rows that are judged: which models answer, at which precisions; one model is in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from polybit.compress.sizes import base_model, default_presets, preset_sizes, stored_widths
from polybit.core.runtime import PolybitError
from polybit.evals import conversation
from polybit.evals.frozen_answers import FLOAT, AnswerRow, Freezer, Scripts, Talks, digest_of
from polybit.evals.judge_questions import read_answers
from polybit.hub.lm import LocalLM
from polybit.hub.models import open_model
from polybit.hub.workers import Team
from polybit.hub.workspace import model_digest


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


def open_reference(entrants: Sequence[Entrant], named: str | None, *, trust_remote_code: bool, device: str = "cpu"):
    """The float model the others are compared with: (name, model, tokenizer)."""
    name = named
    for entrant in entrants:
        if name is None and not entrant.is_file:
            model, _ = open_model(entrant.source, trust_remote_code=trust_remote_code)
            name = base_model(model) or (entrant.source if stored_widths(model) is None else None)
            del model
    if name is None:
        raise PolybitError("no model says which float model it was made from: name it with --reference")
    model, tokenizer = open_model(name, trust_remote_code=trust_remote_code, device=device)
    if stored_widths(model) is not None:
        raise PolybitError(f"the reference {name} is itself quantized: give the float model it was made from")
    return name, model, tokenizer


class Speaker:
    """A worker that lets models talk, one at a time: told (model, precision, scripts, label) it gives a Talk."""

    def __init__(self, max_tokens: int, trust_remote_code: bool, device: str) -> None:
        self.max_tokens, self.trust_remote_code, self.device = max_tokens, trust_remote_code, device
        self.source: str | None = None
        self.lm: LocalLM | None = None

    def __call__(self, task: tuple[str, str | None, Scripts, str]) -> conversation.Talk:
        """Answers to every turn of every script."""
        source, preset, scripts, label = task
        if self.lm is None or self.source != source:
            self.lm = None  # the one before goes first
            model, tokenizer = open_model(source, trust_remote_code=self.trust_remote_code, device=self.device)
            self.source, self.lm = source, LocalLM(model, tokenizer)
        with self.lm.at(preset):
            return conversation.converse(self.lm, scripts, max_tokens=self.max_tokens, label=label)


def talks(
    lm: LocalLM, source: str, preset: str | None, *, max_tokens: int, label: str, team: Team | None = None
) -> Talks:
    """Who answers the parts of a row: `lm` here, or a team of Speakers that open its `source`."""

    def here(parts: list[Scripts]) -> Iterator[tuple[int, conversation.Talk]]:
        for number, scripts in enumerate(parts):
            with lm.at(preset):
                yield number, conversation.converse(lm, scripts, max_tokens=max_tokens, label=label)

    if team is None:
        return here
    return lambda parts: team.map([(source, preset, scripts, label) for scripts in parts])


def gather_rows(
    entrants: Sequence[Entrant],
    freezer: Freezer,
    *,
    precision: str | None,
    max_tokens: int,
    trust_remote_code: bool,
    device: str = "cpu",
    team: Team | None = None,
) -> list[AnswerRow]:
    """Answers of every entrant at every precision; one model is in memory at a time.

    team: Speakers who share the questions (default: this process)
    """
    rows: list[AnswerRow] = []
    for entrant in entrants:
        if entrant.is_file:
            answers = read_answers(entrant.source)
            rows.append(AnswerRow(str(entrant.name), answers, digest_of(answers)))
            continue
        model, tokenizer = open_model(entrant.source, trust_remote_code=trust_remote_code, device=device)
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
                talk = talks(lm, entrant.source, preset, max_tokens=max_tokens, label=name, team=team)
                row = freezer.answer(name, origin, talk, sizes.get(preset or ""))
            rows.append(row)
        del model, lm
    names = [row.name for row in rows]
    if len(set(names)) != len(names):
        raise PolybitError(f"two rows are called {max(names, key=names.count)!r}: name them, as in NAME=MODEL@w3")
    return rows
