"""Judged evaluation against judges whose verdicts we know: order, ties, faults, prompts, and the real 2023 verdicts."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import pytest

from polybit.core.runtime import PolybitError
from polybit.evals import judge as judged
from polybit.evals.judge_prompts import OWN, SKILLS, choose, read_prompts, read_skills
from polybit.evals.judge_questions import Question, read_answers, read_questions
from polybit.hub.endpoint import Reply

DATA = Path(os.environ.get("POLYBIT_DATA", Path(__file__).parents[3] / "shared" / "data"))
HERE = pytest.mark.skipif(
    not (DATA / "mt_bench").is_dir(), reason="MT-Bench is not here; POLYBIT_DATA names its folder"
)


def questions(n=20):
    return [Question(f"q{i}", (f"Question {i}?", "And then?"), "math" if i % 2 else "writing") for i in range(n)]


def answers(asked, text):
    return {q.id: [text(q, turn) for turn in range(2)] for q in asked}


def replying(rule):
    """An `ask` that answers by a rule on the text the judge sees."""
    return lambda requests: [None if (t := rule(m[-1]["content"])) is None else Reply(t, "stop") for m in requests]


def longer(text):
    """Prefers the longer of the last answers of A and B."""
    found = dict(re.findall(r"Assistant ([AB]): (.*)" if "Conversation" in text else r"assistant ([AB]):\n(.*)", text))
    a, b = len(found["A"]), len(found["B"])
    return "[[C]]" if a == b else "[[A]]" if a > b else "[[B]]"


def test_an_honest_judge_decides_every_game():
    asked = questions()
    good, bad = answers(asked, lambda q, t: f"{q.id} in full detail {t}"), answers(asked, lambda q, t: f"{q.id} {t}")
    games = judged.judge_pairs(asked, good, bad, OWN, replying(longer))
    assert len(games) == 40 and {game.outcome for game in games} == {"win"}
    numbers = judged.pair_numbers(games)
    assert numbers["win"]["value"] == 1 and numbers["lose"]["value"] == 0 and numbers["win"]["n"] == 20
    assert numbers["lose"]["high"] > 0, "forty of forty is not certainty"
    back = judged.judge_pairs(asked, bad, good, OWN, replying(longer))
    assert {game.outcome for game in back} == {"lose"}


def test_a_judge_that_always_likes_the_first_gives_ties_only():
    asked = questions()
    a, b = answers(asked, lambda q, t: "one"), answers(asked, lambda q, t: "two")
    games = judged.judge_pairs(asked, a, b, OWN, replying(lambda text: "[[A]]"))
    assert {game.outcome for game in games} == {"tie"} and games[0].verdicts == ("win", "lose")
    assert judged.pair_numbers(games)["consistent"]["value"] == 0


def test_equal_answers_are_a_tie_without_asking():
    asked = questions(3)
    same = answers(asked, lambda q, t: "same")
    other = {**same, "q0": ["same ", "differs"], "q1": ["differs", "same"]}

    def ask(requests):
        assert len(requests) == 2 * 3, "q0 parts at turn 2, q1 at turn 1 and so at both"
        return [Reply("[[C]]", "stop") for _ in requests]

    numbers = judged.pair_numbers(judged.judge_pairs(asked, same, other, OWN, ask))
    assert numbers["identical"] == 3 and numbers["tie"]["value"] == 1


def test_faults_are_counted_and_never_guessed():
    asked = questions(4)
    a, b = answers(asked, lambda q, t: f"one {q.id}"), answers(asked, lambda q, t: f"two {q.id}")
    replies = [Reply("[[A]]", "stop"), Reply("mumble", "stop"), Reply("no", "stop", True), Reply("[[B]]", "stop"), None]
    replies += [Reply("[[A]]", "stop"), *[Reply("[[A]]", "stop"), Reply("[[B]]", "stop")] * 5]
    games = judged.judge_pairs(asked, a, b, OWN, lambda requests: replies)
    numbers = judged.pair_numbers(games)
    assert [game.outcome for game in games][:3] == ["unparsed", "refused", "unanswered"]
    assert (numbers["unparsed"], numbers["refused"], numbers["unanswered"], numbers["decided"]) == (1, 1, 1, 5)
    assert numbers["win"]["value"] == 1
    mad = judged.pair_numbers(judged.judge_pairs(asked, a, b, OWN, replying(lambda text: "wibble")))
    assert mad["decided"] == 0 and mad["win"] is None and mad["unparsed"] == 8


def test_the_judge_never_learns_who_wrote_what():
    asked = questions(2)
    seen = []

    def ask(requests):
        seen.extend(requests)
        return [Reply("[[C]]", "stop") for _ in requests]

    judged.judge_pairs(asked, answers(asked, lambda q, t: "x1"), answers(asked, lambda q, t: "x2"), OWN, ask)
    text = json.dumps(seen)
    assert not re.search(r"w3|float|candidate|baseline|polybit|quanti", text, flags=re.I)
    first, swapped = seen[0][-1]["content"], seen[1][-1]["content"]
    assert first.replace("x1", "@").replace("x2", "x1").replace("@", "x2") == swapped


def test_braces_in_answers_stay():
    filled = OWN["pair"].fill({"question": "{answer_a}", "answer_a": "{answer_b}", "answer_b": "{x} {}"})
    assert (
        "{answer_a}" in filled[1]["content"]
        and "{answer_b}" in filled[1]["content"]
        and "{x} {}" in filled[1]["content"]
    )


def test_grades_by_turn_and_category():
    asked = questions(6)
    said = answers(asked, lambda q, t: f"answer {t}")
    rule = lambda text: "[[8]]" if "answer 1" not in text else "[[4]]"  # noqa: E731
    numbers = judged.grade_numbers(judged.judge_grades(asked, said, OWN, replying(rule)))
    assert numbers["mean"]["value"] == 6 and numbers["mean"]["n"] == 6
    assert (numbers["by_turn"]["1"]["value"], numbers["by_turn"]["2"]["value"]) == (8, 4)
    none = judged.grade_numbers(judged.judge_grades(asked, said, OWN, replying(lambda text: "great")))
    assert none["mean"] is None and none["unparsed"] == 12


def test_skills():
    asked = [
        Question("a", ("Do it.",), skills=("Readability", "Conciseness")),
        Question("b", ("Be.",), skills=("Factuality",)),
    ]
    said = {"a": ["done"], "b": ["am"]}
    rule = lambda text: "{'Readability': 4, 'Conciseness': 2}" if "Do it" in text else "I pass"  # noqa: E731
    numbers = judged.grade_numbers(judged.judge_skills(asked, said, OWN, SKILLS, replying(rule)))
    assert numbers["by_skill"]["Readability"]["value"] == 4 and numbers["by_skill"]["Factuality"] is None
    assert numbers["unparsed"] == 1 and len(SKILLS) == 12
    with pytest.raises(PolybitError, match="No question names its skills"):
        judged.judge_skills(questions(2), said, OWN, SKILLS, replying(rule))


def test_references_are_shown_where_fastchat_shows_them():
    math = Question("1", ("2+2?", "And 3?"), "math", ("4", "5"))
    assert choose(OWN, "pair", math, 0) is OWN["pair reference"]
    assert choose(OWN, "pair", math, 1) is OWN["pair reference talk"]
    writing = Question("2", ("Write.", "More."), "writing", ("text",))
    assert choose(OWN, "single", writing, 1) is OWN["single talk"]
    for prompt in OWN.values():
        values = {name: f"<{name}>" for name in re.findall(r"\{(\w+)\}", prompt.template)}
        assert "{" not in prompt.fill(values)[1]["content"]


def test_bad_files(tmp_path):
    def write(name, *rows):
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return path

    for path, reader, word in (
        (write("a.jsonl", {"x": 1}), read_questions, "needs"),
        (write("b.jsonl", {"id": 1, "turns": ["a"]}, {"id": 1, "turns": ["b"]}), read_questions, "repeated"),
        (write("c.jsonl"), read_questions, "no rows"),
        (write("d.jsonl", {"question_id": 1, "text": 3}), read_answers, "is no answer"),
        (write("e.jsonl", {"name": "pair-v2"}), read_prompts, "is no judge prompt"),
        (
            write("f.jsonl", {"name": "odd", "system_prompt": "", "prompt_template": ""}),
            read_prompts,
            "no prompt we know",
        ),
        (write("g.jsonl", {"Skill": 1}), read_skills, "needs rows"),
        (tmp_path / "none.jsonl", read_questions, "is no file"),
    ):
        with pytest.raises(PolybitError, match=word):
            reader(path)
    with pytest.raises(PolybitError, match="no full answer"):
        judged.check_answers("w3", questions(2), {"q0": ["a", "b"], "q1": ["a"]})


@HERE
def test_the_published_files_fit():
    bench = DATA / "mt_bench"
    asked = read_questions(
        bench / "mt_bench/question.jsonl", references=bench / "mt_bench/reference_answer/gpt-4.jsonl"
    )
    prompts = read_prompts(bench / "judge_prompts.jsonl")
    said = answers(asked, lambda q, t: f"{{answer}} {t}")
    other = answers(asked, lambda q, t: f"other {t}")
    seen = []

    def ask(requests):
        seen.extend(text for request in requests for text in (request[-1]["content"],))
        return [Reply("[[A]]", "stop") for _ in requests]

    judged.judge_pairs(asked, said, other, prompts, ask)
    judged.judge_grades(asked, said, prompts, lambda requests: [ask([r])[0] for r in requests])
    assert len(seen) == len(asked) * 6
    assert not [text for text in seen if re.search(r"\{(question|answer_[ab12]|ref_answer)\w*\}", text)]
    shown = sum(question.category in ("math", "reasoning", "coding") for question in asked)
    assert shown >= 10 and sum("Reference Answer" in text for text in seen) == 6 * shown
    korean = read_prompts(bench / "komt_bench/judge_prompts_ko.jsonl")
    assert korean["single talk"].system != OWN["single talk"].system
    flask = read_questions(DATA / "flask/evaluation_set/flask_evaluation.jsonl")
    skills = read_skills(DATA / "flask/metadata_annotation/skillset/src/skillset_description.json")
    prompt = choose(read_prompts(DATA / "flask/gpt_review/src/prompt.jsonl"), "skills", flask[0], 0)
    assert {name for q in flask for name in q.skills} <= skills.keys() and "{sample_answer}" in prompt.template


@HERE
def test_the_2023_reviews_give_the_counts_of_their_grades():
    """The whole path from reviews to win, tie, lose, with the real judge of 2023 in one order."""
    folder = DATA / "mt_bench/vicuna_eval_2023"
    path = folder / "review/vicuna-13b_20230322-new-hp-fp16/review_bard_vicuna-13b-20230322-new-hp-fp16.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    asked = read_questions(folder / "question.jsonl")
    first = read_answers(folder / "answer/answer_bard.jsonl")
    second = read_answers(folder / "answer/answer_vicuna-13b-20230322-new-hp-fp16.jsonl")
    prompts = read_prompts(folder / "prompt.jsonl")
    assert prompts["pair"].reads == prompts["pair math"].reads == "two grades"
    text_of = {str(row["question_id"]): row["text"] for row in rows}

    def ask(requests):
        texts = [text_of[q.id] for q in asked for _ in range(2)]
        return [Reply(text, "stop") if n % 2 == 0 else None for n, text in enumerate(texts)]

    games = judged.judge_pairs(asked, first, second, prompts, ask)
    noted = Counter("win" if a > b else "lose" if a < b else "tie" for a, b in (row["score"] for row in rows))
    assert Counter(game.verdicts[0] for game in games) == noted and len(games) == 80
