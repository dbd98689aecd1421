"""Numbers of judged rows: verdicts of an endpoint against a baseline, grades, and offline closeness to the float model.

Each function gives (row name -> mode -> numbers, records): the records, one per verdict, go to disk line by line.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from polybit.data.stream import encode
from polybit.evals import fidelity
from polybit.evals import judge as judged
from polybit.evals.conversation import fit, history
from polybit.evals.frozen_answers import FLOAT, AnswerRow
from polybit.evals.judge_prompts import Prompts
from polybit.evals.judge_questions import Question
from polybit.hub.lm import LocalLM

Numbers = dict[str, dict[str, Any]]
Records = list[dict[str, Any]]
LEAD_ANSWERS = 16  # float answers that tell how the model begins one
SHOWN = 6


def verdicts(
    rows: Sequence[AnswerRow],
    baseline: AnswerRow,
    questions: Sequence[Question],
    modes: Collection[str],
    prompts: Prompts,
    skills: Mapping[str, str],
    asking: Callable[[str], judged.Ask],
    *,
    seed: int,
) -> tuple[Numbers, Records]:
    """Pairs against the baseline, single grades and skill grades; `asking` gives the endpoint under a label."""
    numbers: Numbers = {row.name: {} for row in rows}
    records: Records = []
    for row in rows:
        found = numbers[row.name]
        if "pair" in modes and row is not baseline:
            ask = asking(f"{row.name} against {baseline.name}")
            games = judged.judge_pairs(questions, row.answers, baseline.answers, prompts, ask)
            found["pair"] = judged.pair_numbers(games, seed=seed)
            records += [{"mode": "pair", "row": row.name, "baseline": baseline.name, **asdict(game)} for game in games]
        for mode in ("single", "skills"):
            if mode not in modes:
                continue
            ask = asking(f"{row.name}, {mode}")
            if mode == "single":
                grades = judged.judge_grades(questions, row.answers, prompts, ask)
            else:
                grades = judged.judge_skills(questions, row.answers, prompts, skills, ask)
            found[mode] = judged.grade_numbers(grades, seed=seed)
            records += [{"mode": mode, "row": row.name, **asdict(grade)} for grade in grades]
    return numbers, records


def fidelities(
    reference: LocalLM,
    rows: Sequence[AnswerRow],
    questions: Sequence[Question],
    baseline: str,
    *,
    max_tokens: int,
    seed: int,
) -> tuple[Numbers, Records]:
    """How close each row is to the float model's answers, and which of it and the baseline's row is closer."""
    places = [(q, turn) for q in questions for turn in range(len(q.turns))]
    prompts, wanted, rows_tokens = fidelity_tokens(reference, rows, places, max_tokens)
    clusters = [question.id for question, _ in places]
    found: dict[str, list[fidelity.Closeness]] = {}
    for row in rows:
        nats = fidelity.mean_logprob(reference, prompts, rows_tokens[row.name], label=f"fidelity, {row.name}")
        pairs = zip(wanted, rows_tokens[row.name], nats, strict=True)
        found[row.name] = [fidelity.closeness(*item) for item in pairs]
    numbers: Numbers = {}
    records: Records = []
    for row in rows:
        own = found[row.name]
        entry = numbers[row.name] = {"closeness": fidelity.closeness_numbers(own, clusters=clusters, seed=seed)}
        if row.name not in (baseline, FLOAT):
            entry["fidelity"] = fidelity.fidelity_numbers(own, found[baseline], clusters=clusters, seed=seed)
        for (question, turn), item in zip(places, own, strict=True):
            shown = asdict(item) | {"nats": None if item.nats == float("-inf") else item.nats}
            records.append({"mode": "fidelity", "row": row.name, "question": question.id, "turn": turn + 1, **shown})
    return numbers, records


def fidelity_baseline(rows: Sequence[AnswerRow], asked: str | None) -> str:
    """The row that closeness is compared with: the one asked for unless it is the float model's, else the first."""
    others = [row.name for row in rows if row.name != FLOAT]
    return asked if asked is not None and asked in others else others[0]


def fidelity_tokens(
    reference: LocalLM, rows: Sequence[AnswerRow], places: Sequence[tuple[Question, int]], max_tokens: int
) -> tuple[list[list[int]], list[list[int]], dict[str, list[list[int]]]]:
    """Prompts with the float model's own history, its answers, and every row's, all in the reference's tokens."""

    def ids(text: str) -> list[int]:
        return encode(reference.tokenizer, text).tolist()

    own = next(row for row in rows if row.name == FLOAT).answers
    prompts = [
        fit(reference, history(question.turns, own[question.id][:turn]), max_tokens)[0] for question, turn in places
    ]
    texts = {row.name: [row.answers[question.id][turn].strip() for question, turn in places] for row in rows}
    first = texts[FLOAT][:LEAD_ANSWERS]
    lead = fidelity.answer_lead(reference, prompts[:LEAD_ANSWERS], first, ids)
    tokens = {name: [ids(lead + text) if text else [] for text in said] for name, said in texts.items()}
    return prompts, tokens[FLOAT], tokens


def samples(questions: Sequence[Question], rows: Sequence[AnswerRow]) -> Records:
    """A few questions with every row's answers, those first where the rows differ most."""

    def spread(question: Question) -> int:
        return len({tuple(row.answers[question.id]) for row in rows})

    chosen = sorted(questions, key=lambda question: -spread(question))[:SHOWN]
    return [
        {"question": q.id, "turns": list(q.turns), "answers": {row.name: row.answers[q.id] for row in rows}}
        for q in chosen
    ]
