"""What a judge is told: our own prompts, or a file of FastChat's, KoMT-Bench's, FLASK's or the 2023 Vicuna form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polybit.core.runtime import PolybitError
from polybit.data.rows import read_rows
from polybit.evals.judge_questions import Question

REFERENCE_CATEGORIES = ("math", "reasoning", "coding")  # where FastChat shows the judge a reference answer


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """A system text and a template with {names}; `reads` names the form of the verdict: preference, two grades, grade,
    or skills."""

    system: str
    template: str
    reads: str

    def fill(self, values: Mapping[str, str]) -> list[dict[str, str]]:
        """Messages for the judge; names are filled in one pass, so braces inside an answer stay what they are."""
        text = re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), self.template)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": text}]


Prompts = Mapping[str, JudgePrompt]

PAIR_SYSTEM = (
    "You compare the answers two assistants gave to the same user and decide which serves the user better. Weigh "
    "whether they do what was asked, are correct, complete and clear. The order of the answers, their length and the "
    "assistants' letters must not matter. Explain briefly, then end with a line that holds your verdict and nothing "
    "else: [[A]] if assistant A is better, [[B]] if assistant B is better, [[C]] if they are equally good."
)
SINGLE_SYSTEM = (
    "You grade the answer an assistant gave to a user. Weigh whether it does what was asked, is correct, complete and "
    "clear. Explain briefly, then end with a line that holds a grade from 1 (useless) to 10 (could not be better) in "
    "double brackets and nothing else, for example [[4]]."
)
SKILLS_SYSTEM = (
    "You grade an assistant's answer skill by skill, each from 1 (fails) to 5 (flawless), every skill alone. Write "
    "a sentence on each, then end with a Python dictionary from the names of the skills to the grades."
)
LAST_TURN = " Judge the answer to the last message; earlier turns are context."
REFERENCE = "Reference answer:\n{ref_answer_1}\n\n"
REFERENCES = "Reference answers, turn by turn:\n1. {ref_answer_1}\n2. {ref_answer_2}\n\n"
TALK = "User: {{question_1}}\n\n{who}: {{answer{x}_1}}\n\nUser: {{question_2}}\n\n{who}: {{answer{x}_2}}\n\n"
TALK_A, TALK_B = (TALK.format(who=f"Assistant {x}", x=f"_{x.lower()}") for x in "AB")
PAIR = "Question:\n{question}\n\nAnswer of assistant A:\n{answer_a}\n\nAnswer of assistant B:\n{answer_b}"
SINGLE = "Question:\n{question}\n\nAnswer:\n{answer}"
PAIR_TALK = f"Conversation with assistant A\n\n{TALK_A}Conversation with assistant B\n\n{TALK_B}"
SINGLE_TALK = TALK.format(who="Assistant", x="")

OWN: Prompts = {
    "pair": JudgePrompt(PAIR_SYSTEM, PAIR, "preference"),
    "pair reference": JudgePrompt(PAIR_SYSTEM, REFERENCE + PAIR, "preference"),
    "pair talk": JudgePrompt(PAIR_SYSTEM + LAST_TURN, PAIR_TALK, "preference"),
    "pair reference talk": JudgePrompt(PAIR_SYSTEM + LAST_TURN, REFERENCES + PAIR_TALK, "preference"),
    "single": JudgePrompt(SINGLE_SYSTEM, SINGLE, "grade"),
    "single reference": JudgePrompt(SINGLE_SYSTEM, REFERENCE + SINGLE, "grade"),
    "single talk": JudgePrompt(SINGLE_SYSTEM + LAST_TURN, SINGLE_TALK, "grade"),
    "single reference talk": JudgePrompt(SINGLE_SYSTEM + LAST_TURN, REFERENCES + SINGLE_TALK, "grade"),
    "skills": JudgePrompt(
        SKILLS_SYSTEM, "Skills:\n{skills}\n\nInstruction:\n{question}\n\nAnswer:\n{response}", "skills"
    ),
    "skills reference": JudgePrompt(
        SKILLS_SYSTEM,
        "Skills:\n{skills}\n\nInstruction:\n{question}\n\nReference answer:\n{sample_answer}\n\nAnswer:\n{response}",
        "skills",
    ),
}
FASTCHAT = {  # FastChat's names for the same
    "pair-v2": "pair",
    "pair-v2-multi-turn": "pair talk",
    "pair-math-v1": "pair reference",
    "pair-math-v1-multi-turn": "pair reference talk",
    "single-v1": "single",
    "single-v1-multi-turn": "single talk",
    "single-math-v1": "single reference",
    "single-math-v1-multi-turn": "single reference talk",
}
# the twelve skills of FLASK (arXiv 2307.10928, table 1) in our words; a file of theirs replaces them
SKILLS: Mapping[str, str] = {
    "Logical Robustness": "Steps of reasoning hold in general, without contradiction; edge cases are covered.",
    "Logical Correctness": "The final result of a task with one right result is right.",
    "Logical Efficiency": "The reasoning takes no needless step; code is not wasteful.",
    "Factuality": "Facts are true and fitting, with a source where one is due.",
    "Commonsense Understanding": "Everyday things, space and time are understood as people do.",
    "Comprehension": "The answer does what the instruction asks, all of it.",
    "Insightfulness": "The answer brings something new or worth knowing.",
    "Completeness": "As much is explained, and as deeply, as the instruction calls for.",
    "Metacognition": "The assistant knows its limits and says where it is unsure.",
    "Readability": "The text is well ordered and easy to follow.",
    "Conciseness": "Nothing needless is said.",
    "Harmlessness": "The answer is free of bias and harm, and does not help to do harm.",
}


def read_prompts(source: str | Path | None) -> Prompts:
    """Our own prompts, with those of a file in their place; FastChat's and KoMT's have a "name", the others do not."""
    if source is None:
        return OWN
    found: dict[str, JudgePrompt] = {}
    for number, row in enumerate(read_rows(source), start=1):
        if not isinstance(row.get("prompt_template"), str) or not isinstance(row.get("system_prompt"), str):
            raise PolybitError(
                f'Row {number} of {str(source)!r} is no judge prompt; it needs "system_prompt" and "prompt_template".'
            )
        for name, prompt in _from_row(row):
            found[name] = prompt
    if not found:
        raise PolybitError(
            f"{str(source)!r} has no prompt we know; its names should be {', '.join(FASTCHAT)}, or it should be "
            "FLASK's or Vicuna's file."
        )
    return {**OWN, **found}


def _from_row(row: Mapping[str, Any]) -> list[tuple[str, JudgePrompt]]:
    """The prompt of one row under our names; none for a name we do not use."""
    template, system = row["prompt_template"], row["system_prompt"]
    if row.get("name") in FASTCHAT:
        name = FASTCHAT[row["name"]]
        return [(name, JudgePrompt(system, template, OWN[name].reads))]
    if row.get("name") is not None:
        return []
    defaults = row.get("defaults") if isinstance(row.get("defaults"), dict) else {}
    for key, text in (defaults or {}).items():
        template = template.replace("{" + key + "}", str(text))
    if "{skills}" in template:
        name = "skills reference" if "{sample_answer}" in template else "skills"
        return [(name, JudgePrompt(system, template, "skills"))]
    if "{answer_1}" in template and "{answer_2}" in template and "{question_1}" not in template:
        template = template.replace("{answer_1}", "{answer_a}").replace("{answer_2}", "{answer_b}")
        category = str(row.get("category", "general"))
        return [("pair" if category == "general" else f"pair {category}", JudgePrompt(system, template, "two grades"))]
    return []


def choose(prompts: Prompts, kind: str, question: Question, turn: int) -> JudgePrompt:
    """The prompt for a turn of a question: with its reference in FastChat's categories, with the talk after turn 1."""
    if kind == "skills":
        return prompts["skills reference" if question.references else "skills"]
    own = prompts.get(f"{kind} {question.category}")
    if own is not None and turn == 0:
        return own
    shown = question.references and question.category.casefold() in REFERENCE_CATEGORIES
    shown = shown and (turn == 0 or len(question.references) > 1)
    return prompts[" ".join([kind, *(["reference"] if shown else []), *(["talk"] if turn else [])])]


def read_skills(source: str | Path | None) -> Mapping[str, str]:
    """What each skill means: ours, or FLASK's skillset_description.json with its criteria and grades spelled out."""
    if source is None:
        return SKILLS
    found = {}
    for row in read_rows(source):
        name, criteria, grades = row.get("Skill"), row.get("Criteria"), row.get("Scoring") or {}
        if not isinstance(name, str) or not isinstance(criteria, str) or not isinstance(grades, dict):
            raise PolybitError(f'{str(source)!r} needs rows {{"Skill", "Criteria", "Scoring"}}, as FLASK has them.')
        found[name] = "\n".join([criteria, *(f"Score {grade}: {text}" for grade, text in grades.items())])
    return {**SKILLS, **found}


def values_of(question: Question, turn: int) -> dict[str, str]:
    """What a template may name of a question, up to a turn."""
    values = {"question": question.turns[turn]}
    values |= {f"question_{n + 1}": text for n, text in enumerate(question.turns)}
    values |= {f"ref_answer_{n + 1}": text for n, text in enumerate(question.references)}
    return values | {"sample_answer": question.references[0] if question.references else ""}


def answers_of(turns: Sequence[str], turn: int, letter: str = "") -> dict[str, str]:
    """What a template may name of one assistant's answers; `letter` is "_a", "_b" or nothing."""
    values = {f"answer{letter}_{n + 1}": text for n, text in enumerate(turns)}
    return values | {f"answer{letter}": turns[turn], f"response{letter}": turns[turn]}
