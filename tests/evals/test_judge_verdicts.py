"""Parsers of verdicts: what they read, what they refuse to guess, and the real GPT-4 reviews of 2023 where present."""

import json
import os
from pathlib import Path

import pytest

from polybit.evals.judge_verdicts import grade, preference, skill_grades, two_grades

DATA = Path(os.environ.get("POLYBIT_DATA", Path(__file__).parents[3] / "shared" / "data"))
REVIEWS = DATA / "mt_bench" / "vicuna_eval_2023" / "review"


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("A is better. [[A]]", "first"),
        ("Both fail.\n\n[[C]]", "tie"),
        ("B 비서가 더 좋습니다. [[B]]", "second"),
        ('The format is "[[A]]" or "[[B]]".\nMy verdict: [[B]]', "second"),
        ("[[A]] ... and again: [[A]]", "first"),
        ("<think>[[A]] perhaps</think>\nFinal: [[B]]", "second"),
        ("<think>[[A]] is what I think, and then I never stop", None),
        ('I cannot choose between "[[A]]" and "[[B]]"', None),
        ("[[D]]", None),
        ("A is better", None),
        ("[A]", None),
        ("", None),
    ],
)
def test_preference(reply, expected):
    assert preference(reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Rating: [[7]]", 7),
        ("점수: [[8.5]]", 8.5),
        ("Fine work.\nRating: [[9/10]]", 9),
        ('As in "[[5]]".\nRating: [[3]]', 3),
        ("Rating: [6]", 6),
        ("see source [1], rating unclear", None),
        ("[[11]]", None),
        ("[[0]]", None),
        ("[[rating]]", None),
        ("Rating: [[3]] or [[4]]", None),
        ("7/10", None),
        ("", None),
    ],
)
def test_grade(reply, expected):
    assert grade(reply) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("9 8.5\nAssistant 1 was more helpful.", (9, 8.5)),
        ("8, 7\nok", (8, 7)),
        ("First I solve it: from (2, -2) to (10, 4).\nScores:\nAssistant 1: 10\nAssistant 2: 4 (slip)", (10, 4)),
        ("... steps.\nOutput: (1, 7)", (1, 7)),
        ("The points are (2, 2) and (10, 4).", None),
        ("Assistant 1: 3\nAssistant 2: 4\nOutput: (4, 3)", None),
        ("Assistant 1: 3\nAssistant 1: 5\nAssistant 2: 4", None),
        ("11 3\n", None),
        ("I would rather not say.", None),
    ],
)
def test_two_grades(reply, expected):
    assert two_grades(reply) == expected


def test_skill_grades_are_all_or_nothing():
    skills = ["Logical Correctness", "Readability"]
    assert skill_grades("{'Logical Correctness': 4, 'readability': 5}", skills) == {
        "Logical Correctness": 4,
        "Readability": 5,
    }
    assert skill_grades("```python\n{'logical_correctness': '3', 'Readability': 5}\n```", skills) is not None
    assert (
        skill_grades("draft {'Logical Correctness': 1, 'Readability': 1}\nfinal {'Logical Correctness': 2}", skills)
        is None
    )
    for reply in ("{'Readability': 5}", "{'Logical Correctness': 6, 'Readability': 5}", "4 and 5", "{not python}", ""):
        assert skill_grades(reply, skills) is None
    assert skill_grades("{'Logical Correctness': True, 'Readability': 'N/A'}", skills) is None


@pytest.mark.skipif(not REVIEWS.is_dir(), reason="the 2023 reviews are not here; POLYBIT_DATA names their folder")
def test_the_real_gpt4_reviews_of_2023():
    """640 reviews with the grades people noted down; two notes contradict their own text, which says 10 and 4."""
    read, differ = 0, []
    for path in sorted(REVIEWS.glob("*/*.jsonl")):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found = two_grades(row["text"])
            read += found is not None
            if found is not None and list(found) != row["score"]:
                differ.append((path.stem, row["question_id"], found, row["score"]))
    assert read == 640
    assert [(number, found, noted) for _, number, found, noted in differ] == [(70, (10, 4), [10, 2])] * 2
