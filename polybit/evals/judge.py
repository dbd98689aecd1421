"""Judged answers: win, tie and lose against a baseline, grades from 1 to 10, grades by skill; each with an interval.

The judge sees two texts and never who wrote them. Every pair is judged in both orders and counts as won only when both
verdicts agree (FastChat; MT-Bench arXiv 2306.05685, methods of QDPO arXiv 2407.03051). Unlike FastChat, a game with a
verdict that cannot be read is left out and counted, not called a tie; two equal answers are a tie without asking.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from polybit.core.runtime import PolybitError
from polybit.evals.judge_prompts import JudgePrompt, Prompts, answers_of, choose, values_of
from polybit.evals.judge_questions import Question
from polybit.evals.judge_verdicts import grade, preference, skill_grades, two_grades
from polybit.evals.scoring import bootstrap
from polybit.hub.endpoint import Reply

Answers = Mapping[str, Sequence[str]]  # question id -> the assistant's text for each turn
Ask = Callable[[list[list[dict[str, str]]]], list[Reply | None]]
FLIPPED = {"first": "second", "second": "first", "tie": "tie"}
MAX_TURNS = 2  # the published prompts show two turns


@dataclass(frozen=True, slots=True)
class JudgedGame:
    """One turn of one question, candidate against baseline: `outcome` is win, tie, lose, or why there is none.

    verdicts: what the judge preferred in each order, from the candidate's side (win, tie, lose, or unparsed, refused,
    unanswered); empty for two equal answers.
    """

    question: str
    category: str
    turn: int
    outcome: str
    verdicts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Grade:
    """A grade of one turn of one question; None with the reason in `fault`. `part` is the skill, or empty."""

    question: str
    category: str
    turn: int
    part: str
    value: float | None
    fault: str = ""


def check_answers(name: str, questions: Sequence[Question], answers: Answers) -> None:
    """Refuse answers that do not cover the questions."""
    short = [q.id for q in questions if len(answers.get(q.id, ())) < min(len(q.turns), MAX_TURNS)]
    if short:
        raise PolybitError(
            f"{len(short)} of {len(questions)} questions have no full answer of {name!r}, first question {short[0]!r}; "
            "give the answers to these questions."
        )


def turns_of(question: Question) -> range:
    """The turns that are judged."""
    return range(min(len(question.turns), MAX_TURNS))


def judge_pairs(
    questions: Sequence[Question], candidate: Answers, baseline: Answers, prompts: Prompts, ask: Ask
) -> list[JudgedGame]:
    """Judge every turn in both orders."""
    places = [(question, turn) for question in questions for turn in turns_of(question)]
    asked: list[tuple[JudgePrompt, bool]] = []
    requests: list[list[dict[str, str]]] = []
    for question, turn in places:
        ours, theirs = candidate[question.id], baseline[question.id]
        if equal(ours, theirs, turn):
            continue
        prompt = choose(prompts, "pair", question, turn)
        for a, b, swapped in ((ours, theirs, False), (theirs, ours, True)):
            values = values_of(question, turn) | answers_of(a, turn, "_a") | answers_of(b, turn, "_b")
            requests.append(prompt.fill(values))
            asked.append((prompt, swapped))
    replies = iter(zip(asked, ask(requests), strict=True))
    games = []
    for question, turn in places:
        if equal(candidate[question.id], baseline[question.id], turn):
            games.append(JudgedGame(question.id, question.category, turn + 1, "tie", ()))
            continue
        verdicts = tuple(read_preference(*next(replies)) for _ in range(2))
        games.append(JudgedGame(question.id, question.category, turn + 1, outcome(verdicts), verdicts))
    return games


def equal(ours: Sequence[str], theirs: Sequence[str], turn: int) -> bool:
    """Whether both conversations are the same up to this turn."""
    return [text.strip() for text in ours[: turn + 1]] == [text.strip() for text in theirs[: turn + 1]]


def read_preference(asked: tuple[JudgePrompt, bool], reply: Reply | None) -> str:
    """One verdict from the candidate's side."""
    prompt, swapped = asked
    if (fault := fault_of(reply)) or reply is None:
        return fault
    if prompt.reads == "two grades":
        both = two_grades(reply.text)
        found = None if both is None else "tie" if both[0] == both[1] else "first" if both[0] > both[1] else "second"
    else:
        found = preference(reply.text)
    if found is None:
        return "unparsed"
    found = FLIPPED[found] if swapped else found
    return {"first": "win", "second": "lose", "tie": "tie"}[found]


def fault_of(reply: Reply | None) -> str:
    """Why a reply holds no verdict, empty when it may."""
    if reply is None:
        return "unanswered"
    return "refused" if reply.refused else ""


def outcome(verdicts: Sequence[str]) -> str:
    """Both verdicts agree, or it is a tie; a verdict that is missing leaves no outcome."""
    missing = [verdict for verdict in verdicts if verdict not in ("win", "tie", "lose")]
    if missing:
        return missing[0]
    return verdicts[0] if verdicts[0] == verdicts[1] else "tie"


def judge_grades(questions: Sequence[Question], answers: Answers, prompts: Prompts, ask: Ask) -> list[Grade]:
    """Grade every turn from 1 to 10."""
    places = [(question, turn) for question in questions for turn in turns_of(question)]
    requests = [
        choose(prompts, "single", q, turn).fill(values_of(q, turn) | answers_of(answers[q.id], turn))
        for q, turn in places
    ]
    found = []
    for (question, turn), reply in zip(places, ask(requests), strict=True):
        fault = fault_of(reply)
        value = None if fault or reply is None else grade(reply.text)
        found.append(Grade(question.id, question.category, turn + 1, "", value, fault or ("" if value else "unparsed")))
    return found


def judge_skills(
    questions: Sequence[Question], answers: Answers, prompts: Prompts, skills: Mapping[str, str], ask: Ask
) -> list[Grade]:
    """Grade each question's own skills from 1 to 5; questions without skills are left out (FLASK, arXiv 2307.10928)."""
    asked = [question for question in questions if question.skills]
    if not asked:
        raise PolybitError('No question names its skills; give FLASK\'s questions, whose rows have "skill".')
    unknown = {name for question in asked for name in question.skills} - skills.keys()
    if unknown:
        raise PolybitError(f"Skill {min(unknown)!r} has no description; give a file of skills that has it.")
    requests = []
    for question in asked:
        described = "\n\n".join(f"{name}: {skills[name]}" for name in question.skills)
        values = values_of(question, 0) | answers_of(answers[question.id], 0) | {"skills": described}
        requests.append(choose(prompts, "skills", question, 0).fill(values))
    found = []
    for question, reply in zip(asked, ask(requests), strict=True):
        fault = fault_of(reply)
        grades = None if fault or reply is None else skill_grades(reply.text, question.skills)
        for skill in question.skills:
            value = None if grades is None else grades[skill]
            reason = fault or ("unparsed" if grades is None else "")
            found.append(Grade(question.id, question.category, 1, skill, value, reason))
    return found


# numbers ------------------------------------------------------------------------------------------------------


def pair_numbers(games: Sequence[JudgedGame], *, seed: int = 0) -> dict[str, Any]:
    """Rates of win, tie and lose over the games that have an outcome, whole questions resampled.

    lose is QDPO's lose-rate: ties count in the denominator. win_adjusted = win + tie / 2. consistent: share of judged
    games in which both orders gave the same verdict. identical: games with two equal answers, ties by definition.
    """
    decided = [game for game in games if game.outcome in ("win", "tie", "lose")]
    counts = Counter(game.outcome for game in games)
    numbers: dict[str, Any] = {
        "games": len(games),
        "decided": len(decided),
        "identical": sum(not game.verdicts for game in games),
        **{reason: counts[reason] for reason in ("unparsed", "refused", "unanswered")},
    }
    if not decided:
        return {**numbers, **dict.fromkeys(("win", "tie", "lose", "win_adjusted", "win_minus_lose", "consistent"))}
    clusters = [game.question for game in decided]
    for name in ("win", "tie", "lose"):
        hits = np.array([game.outcome == name for game in decided])
        numbers[name] = bootstrap(hits, clusters=clusters, seed=seed).to_json()
    worth = np.array([{"win": 1.0, "tie": 0.5, "lose": 0.0}[game.outcome] for game in decided])
    numbers["win_adjusted"] = bootstrap(worth, clusters=clusters, seed=seed).to_json()
    numbers["win_minus_lose"] = bootstrap(2 * worth - 1, clusters=clusters, seed=seed).to_json()
    judged = [game for game in decided if game.verdicts]
    same = np.array([game.verdicts[0] == game.verdicts[1] for game in judged])
    numbers["consistent"] = (
        bootstrap(same, clusters=[g.question for g in judged], seed=seed).to_json() if judged else None
    )
    numbers["by_category"] = {
        category: dict(Counter(game.outcome for game in games if game.category == category))
        for category in sorted({game.category for game in games})
    }
    return numbers


def grade_numbers(grades: Sequence[Grade], *, seed: int = 0) -> dict[str, Any]:
    """Mean grade over all that were read, by turn, by category and by skill, whole questions resampled."""
    faults = Counter(grade.fault for grade in grades if grade.value is None)

    def mean(chosen: Sequence[Grade]) -> dict[str, Any] | None:
        read = [grade for grade in chosen if grade.value is not None]
        if not read:
            return None
        values = [float(grade.value or 0) for grade in read]
        return bootstrap(values, clusters=[grade.question for grade in read], seed=seed).to_json()

    def split(key: Callable[[Grade], str]) -> dict[str, Any]:
        return {name: mean([g for g in grades if key(g) == name]) for name in sorted({key(g) for g in grades})}

    numbers: dict[str, Any] = {"grades": len(grades), "mean": mean(grades)}
    numbers |= {reason: faults[reason] for reason in ("unparsed", "refused", "unanswered")}
    if any(grade.part for grade in grades):
        return numbers | {"by_skill": split(lambda grade: grade.part)}
    return numbers | {
        "by_turn": split(lambda grade: str(grade.turn)),
        "by_category": split(lambda grade: grade.category),
    }
