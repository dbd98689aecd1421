"""Verdicts read out of a judge's reply: a preference, a grade, two grades, grades by skill. What is not clear is None.

Nothing here guesses. A reply without a verdict, with two that contradict each other, or with a grade outside its range
gives None, and the caller counts it as unparsed. Formats: FastChat's [[A]] and [[7]] (MT-Bench, KoMT-Bench), the two
numbers of the 2023 Vicuna reviews, the Python dictionary of FLASK.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence

PREFERENCES = {"A": "first", "B": "second", "C": "tie"}
NUMBER = r"\d+(?:\.\d+)?"
GRADE_WORDS = r"(?i:rating|score|grade|점수|평점|등급)"
# a line that grades one assistant: "Assistant 1: 7", "Assistant 2: 6/10 (clear steps)"
ASSISTANT_LINE = re.compile(
    rf"^[\s*#-]*assistant\s*([12])[\s*]*:[\s*]*({NUMBER})(?:\s*/\s*10)?(?=[\s*]*(?:$|\())", re.I
)
# a pair in brackets counts only where it is announced, because coordinates look the same
ANNOUNCED_PAIR = re.compile(
    rf"(?:output|tuple|scores?|ratings?)(?:\s+(?:tuple|pair))?(?:\s+(?:is|are|would be))?\s*:?\s*"
    rf"\(\s*({NUMBER})\s*,\s*({NUMBER})\s*\)",
    re.I,
)


def final_text(reply: str) -> str:
    """The reply without the thoughts some models write first between <think> and </think>."""
    text = reply.rsplit("</think>", 1)[-1]
    return "" if "<think>" in text else text  # thoughts that never end hold no verdict


def preference(reply: str) -> str | None:
    """`first`, `second` or `tie` from [[A]], [[B]], [[C]].

    Unlike FastChat, which takes [[A]] wherever both occur, a reply that names several is read by its last line with a
    verdict, and only when that line names a single one.
    """
    found = _last_agreed(final_text(reply), r"\[\[\s*([ABC])\s*\]\]")
    return PREFERENCES[found] if found else None


def grade(reply: str, *, lowest: float = 1, highest: float = 10) -> float | None:
    """A grade from [[7]], or from `Rating: [7]` where the double brackets are missing; None outside its range."""
    text = final_text(reply)
    found = _last_agreed(text, rf"\[\[\s*({NUMBER})(?:\s*/\s*10)?\s*\]\]")
    if found is None and not re.search(r"\[\[", text):
        found = _last_agreed(text, rf"{GRADE_WORDS}\s*:?\s*\**\s*\[\s*({NUMBER})\s*\]")
    if found is None or not lowest <= float(found) <= highest:
        return None
    return float(found)


def _last_agreed(text: str, pattern: str) -> str | None:
    """The verdict all matches agree on, else the only one of the last line that has any."""
    matches = re.findall(pattern, text)
    if len(set(matches)) > 1:
        last = [line for line in text.splitlines() if re.search(pattern, line)][-1:]
        matches = [match for line in last for match in re.findall(pattern, line)]
    return matches[0] if len(set(matches)) == 1 else None


def two_grades(reply: str, *, lowest: float = 0, highest: float = 10) -> tuple[float, float] | None:
    """Grades of assistants 1 and 2 as the 2023 Vicuna judge gave them.

    The first line holds two numbers and nothing else; or the text ends with a line for each assistant, or with an
    announced pair such as `Output: (1, 7)`. Where several of these stand, they must agree.
    """
    text = final_text(reply).strip()
    first = text.split("\n", 1)[0].strip().strip("()")
    both = re.fullmatch(rf"({NUMBER})\s*[\s,]\s*({NUMBER})", first)
    candidates = {(float(both[1]), float(both[2]))} if both else set()
    if not candidates:
        lines = [match for line in text.splitlines() if (match := ASSISTANT_LINE.match(line))]
        by_assistant = {int(match[1]): float(match[2]) for match in lines}
        if len(by_assistant) == 2 and len(lines) == 2:
            candidates.add((by_assistant[1], by_assistant[2]))
        candidates |= {(float(a), float(b)) for a, b in ANNOUNCED_PAIR.findall(text)}
    if len(candidates) != 1:
        return None
    pair = candidates.pop()
    return pair if all(lowest <= value <= highest for value in pair) else None


def skill_grades(
    reply: str, skills: Sequence[str], *, lowest: float = 1, highest: float = 5
) -> dict[str, float] | None:
    """A grade for each of FLASK's skills, from the last Python or JSON dictionary of the reply; all or nothing.

    Names are compared without regard to case, blanks and underscores; "N/A" for a skill is no grade.
    """
    wanted = {_plain(skill): skill for skill in skills}
    for text in reversed(re.findall(r"\{[^{}]*\}", final_text(reply))):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if not isinstance(value, dict):
            continue
        found = {_plain(str(name)): grade for name, grade in value.items()}
        if not wanted.keys() <= found.keys():
            return None
        grades = {skill: _number(found[key]) for key, skill in wanted.items()}
        kept = {skill: value for skill, value in grades.items() if value is not None and lowest <= value <= highest}
        return kept if len(kept) == len(wanted) else None
    return None


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.casefold())


def _number(value: object) -> float | None:
    if isinstance(value, str) and re.fullmatch(NUMBER, value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)
