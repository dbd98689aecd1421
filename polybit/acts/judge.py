"""Let models answer, freeze the answers, have them judged by an endpoint, and offline by fidelity."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from polybit.acts.judge_rows import Entrant, Speaker, gather_rows, open_reference, parse_entrant, talks
from polybit.core.records import RUN_FILE, Run
from polybit.core.runtime import PolybitError, atomic_path
from polybit.evals.frozen_answers import FLOAT, AnswerRow, Freezer
from polybit.evals.judge import Ask, check_answers
from polybit.evals.judge_numbers import Numbers, fidelities, fidelity_baseline, samples, verdicts
from polybit.evals.judge_prompts import read_prompts, read_skills
from polybit.evals.judge_questions import Question, questions_digest, read_questions
from polybit.hub.directory import output_lock
from polybit.hub.endpoint import Endpoint, ReplyCache, ask
from polybit.hub.lm import LocalLM
from polybit.hub.workers import Team, Where
from polybit.hub.workspace import model_digest
from polybit.options.checks import plain
from polybit.options.judge import JudgeOptions

REPLIES, VERDICTS = "replies.sqlite", "verdicts.jsonl"


def judge(models: Sequence[str], options: JudgeOptions) -> Run:
    """Judge MODELS, each `[NAME=]MODEL[@PRECISION,...]` or `NAME=answers.jsonl`, against their float model."""
    if not models:
        raise PolybitError(
            "no model to judge: give at least one, as in polybit judge my-model --questions q.jsonl --out d"
        )
    entrants = [parse_entrant(text) for text in models]
    questions = read_questions(options.questions, references=options.references)[: options.limit]
    run = Run("judge", {"models": list(models), **plain(options)})
    with output_lock(options.out), run.timed():
        run.numbers = measure(entrants, questions, options)
        run.write(options.out / RUN_FILE)
    return run


def measure(entrants: Sequence[Entrant], questions: Sequence[Question], options: JudgeOptions) -> dict[str, Any]:
    """Answers first, all of them frozen; then the verdicts."""
    named, reference, rows = answered(entrants, questions, options)
    baseline = find_row(rows, options.baseline or FLOAT)
    numbers: dict[str, Any] = {
        "reference": named,
        "questions": {"n": len(questions), "sha256": questions_digest(questions)},
        "baseline": baseline.name,
        "rows": {row.name: {"answers_sha256": row.sha256, "dropped": row.dropped, **(row.sizes or {})} for row in rows},
    }
    records: list[dict[str, Any]] = []
    if "fidelity" in options.modes:
        closer = numbers["fidelity_baseline"] = fidelity_baseline(rows, options.baseline)
        records += add(
            numbers,
            fidelities(reference, rows, questions, closer, max_tokens=options.max_tokens, seed=options.seed),
        )
    if options.asking:
        numbers["judge"] = {"model": options.judge, "prompts": str(options.prompts or "polybit's own")}
        prompts, skills = read_prompts(options.prompts), read_skills(options.skills)
        endpoint = partial(asking, options)
        records += add(
            numbers,
            verdicts(rows, baseline, questions, options.modes, prompts, skills, endpoint, seed=options.seed),
        )
    numbers["samples"] = samples(questions, rows)
    write_lines(options.out / VERDICTS, records)
    return numbers


def answered(
    entrants: Sequence[Entrant], questions: Sequence[Question], options: JudgeOptions
) -> tuple[str, LocalLM, list[AnswerRow]]:
    """The float model's name, the model, and every row's answers, its own first."""
    named, model, tokenizer = open_reference(
        entrants, options.reference, trust_remote_code=options.trust_remote_code, device=options.device
    )
    reference = LocalLM(model, tokenizer)
    freezer = Freezer(options.out, questions, max_tokens=options.max_tokens, restart=options.restart)
    origin = {"model": model_digest(model), "precision": None}
    with speakers(options) as team:
        talk = talks(reference, named, None, max_tokens=options.max_tokens, label=FLOAT, team=team)
        rows = [freezer.frozen(FLOAT, origin) or freezer.answer(FLOAT, origin, talk)]
        rows += gather_rows(
            entrants,
            freezer,
            precision=options.precision,
            max_tokens=options.max_tokens,
            trust_remote_code=options.trust_remote_code,
            device=options.device,
            team=team,
        )
    for row in rows:
        check_answers(row.name, questions, row.answers)
    return named, reference, rows


def speakers(options: JudgeOptions) -> AbstractContextManager[Team | None]:
    """Workers that share the questions; none where this process answers them."""
    where = Where(options.workers, options.ray)
    if where.alone:
        return nullcontext()
    return Team(Speaker, (options.max_tokens, options.trust_remote_code, options.device), where)


def add(numbers: dict[str, Any], found: tuple[Numbers, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Put what was found of each row beside what is known of it; gives the records."""
    for name, entry in found[0].items():
        numbers["rows"][name] |= entry
    return found[1]


def find_row(rows: Sequence[AnswerRow], name: str) -> AnswerRow:
    """A row by name."""
    for row in rows:
        if row.name == name:
            return row
    raise PolybitError(f"--baseline {name!r} is no row: choose from {', '.join(row.name for row in rows)}")


def asking(options: JudgeOptions, label: str) -> Ask:
    """The endpoint as a function from requests to replies."""
    endpoint = Endpoint(
        str(options.endpoint),
        str(options.judge),
        key=os.environ.get(options.key_from) or "none",
        max_tokens=options.judge_tokens,
        timeout=options.timeout,
        retries=options.retries,
        concurrency=options.concurrency,
    )
    cache = ReplyCache(options.out / REPLIES)
    return lambda requests: ask(endpoint, requests, cache, label=label)


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """One JSON object per line, written atomically."""
    with atomic_path(path) as staged:
        lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        staged.write_text("".join(lines), encoding="utf-8")
