"""Property: the generator tells the truth, keeps its splits apart, and repeats itself for the same seed."""

from __future__ import annotations

import re
from itertools import islice
from random import Random

import pytest

from polybit.data import synth
from polybit.data.synth import arithmetic, dialogue, names, reading

EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
INVENTED = re.compile(r"\b[A-Z][a-z]{3,}\b")


def holds(left: str, operator: str, right: str, value: str) -> bool:
    a, b, c = int(left), int(right), int(value)
    if operator == "/":
        return b * c == a
    return c == {"+": a + b, "-": a - b, "*": a * b}[operator]


def own_words() -> set[str]:
    """Capitalised words of the templates, so that what is left in a text is invented names."""
    texts = [
        text for schema in reading.SCHEMAS.values() for r in schema.values() for text in r.statements + r.questions
    ]
    texts += [text for schema in reading.SCHEMAS.values() for r in schema.values() for text in r.reverse]
    texts += [text for t in arithmetic.TEMPLATES for text in (t.question, t.rationale)] + names.MONTHS
    plain = {name for pair in dialogue.ATLAS for name in pair}
    return plain | {word for text in texts for word in INVENTED.findall(text)} | COMMON


COMMON = {
    "After",
    "Bees",
    "Birds",
    "Compute",
    "Count",
    "Cows",
    "Fish",
    "Friday",
    "Good",
    "Grass",
    "Hello",
    "Many",
    "Monday",
    "Name",
    "Nice",
    "Once",
    "Rain",
    "Remember",
    "Suggest",
    "Tell",
    "Thank",
    "That",
    "Then",
    "They",
    "This",
    "What",
    "When",
    "Where",
    "Which",
    "With",
    "Your",
    "Most",
    "Did",
    "Sundays",
    "Here",
    "Know",
    "Should",
    "Would",
    "Could",
    "There",
    "Call",
    "Right",
}


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_equation_of_a_rationale_holds_and_leads_to_the_number(split: synth.Split) -> None:
    for item in synth.items("arithmetic", 400, 1, split):
        equations = EQUATION.findall(item.answer)
        assert equations and all(holds(*equation) for equation in equations), item
        rationale, number = item.answer.split(" #### ")
        assert rationale == item.extras["rationale"]
        assert int(number) == item.extras["number"] == int(equations[-1][-1])
        given = re.findall(r"\d+", item.messages[0]["content"])
        known = {*given, "2"}
        for left, _, right, value in equations:
            assert {left, right} <= known, item
            known.add(value)


def test_drills_are_right() -> None:
    for seed in range(200):
        turn = arithmetic.drill(Random(seed)).turns[0]
        equations = EQUATION.findall(turn.assistant)
        assert all(holds(*equation) for equation in equations)
        assert [int(value) for *_, value in equations] == turn.truth["values"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_spans_and_unique(split: synth.Split) -> None:
    for item in synth.items("reading", 400, 2, split):
        text, answers = item.extras["passage"], item.extras["answers"]
        start = answers["answer_start"][0]
        assert answers["text"] == [item.answer]
        assert text[start : start + len(item.answer)] == item.answer
        assert item.messages[0]["content"] == f"{text}\n{item.extras['question']}"
    for seed in range(300):
        _, facts, _ = reading.passage(Random(seed), held_out=False, facts=7)
        values = [fact.value for fact in facts]
        assert len(set(values)) == len(values)
        assert not set(values) & {fact.subject for fact in facts}
        asked = [(fact.subject, fact.relation) for fact in facts]
        assert len(set(asked)) == len(asked)


def test_names_of_one_split_never_appear_in_the_other() -> None:
    known = own_words()
    for split, held_out in (("train", False), ("test", True)):
        seen = set()
        for document in islice(synth.documents(3, split=split), 1500):
            for message in document.messages:
                seen |= set(INVENTED.findall(message["content"])) - known
        wrong = sorted(name for name in seen if names.is_held_out(name) != held_out)
        assert not wrong, wrong
        assert len(seen) > 1000


def test_reading_keeps_pairs_of_statement_and_question_apart() -> None:
    rng = Random(4)
    for _ in range(300):
        text, facts, schema = reading.passage(rng, held_out=False, facts=6)
        for new in (False, True):
            for turn in reading.questions(rng, text, facts, schema, new_pairs=new):
                if "reversed" in turn.truth["relation"]:
                    continue
                relation = turn.truth["relation"]
                fact = next(f for f in facts if f.value == turn.assistant)
                wordings = [q.format(s=fact.subject) for q in schema[relation].questions]
                assert reading.is_held_out_pair(relation, fact.statement, wordings.index(turn.user)) == new


def test_contrast_leaves_no_question_to_its_type() -> None:
    for seed in range(200):
        _, facts, _ = reading.passage(Random(seed), held_out=False, facts=0, contrast=True)
        subjects, relations = {fact.subject for fact in facts}, {fact.relation for fact in facts}
        assert len(subjects) >= 2 and len(facts) == len(subjects) * len(relations)
        turns = reading.contrast(Random(seed), held_out=False).turns
        assert all(turn.assistant in turns[0].user for turn in turns)


def test_other_pairs_are_kept_apart() -> None:
    pairs = {(i.extras["template"], i.extras["object"]) for i in synth.items("arithmetic", 1500, 5, "train")}
    assert not any(arithmetic.is_held_out_pair(*pair) for pair in pairs)
    assert len(pairs) > 200
    asked = [i for i in synth.items("dialogue", 1500, 5, "train") if i.extras["kind"] == "ask topic"]
    assert asked and not any(item.extras["new_pair"] for item in asked)
    new = [item.extras.get("new_pair", False) for item in synth.items("reading", 400, 5, "test")]
    assert 120 < sum(new) < 280


def test_dialogue_recalls_what_was_said() -> None:
    for item in synth.items("dialogue", 800, 6):
        said = " ".join(message["content"] for message in item.messages)
        kind = item.extras["kind"]
        if kind == "ask name" and "not tell" not in item.answer:
            assert item.answer.removeprefix("Your name is ").rstrip(".") in said
        if kind == "ask number":
            assert re.findall(r"\d+", item.answer)[0] in said
        if kind == "echo":
            assert item.messages[-1]["content"] == f"Say {item.answer}"
        if kind == "capital":
            land, capital = item.answer.removeprefix("The capital of ").rstrip(".").split(" is ")
            assert (land, capital) in dialogue.ATLAS
        assert kind not in ("greet", "suggest", "story")


@pytest.mark.parametrize("task", synth.TASKS)
def test_items_follow_from_the_seed(task: str) -> None:
    assert synth.items(task, 50, 7) == synth.items(task, 50, 7)
    assert synth.items(task, 50, 7) != synth.items(task, 50, 8)
    assert synth.items(task, 20, 7) == synth.items(task, 50, 7)[:20]
    items = synth.items(task, 50, 7)
    assert len({item.id for item in items}) == 50
    assert all(item.messages[-1]["role"] == "user" and item.answer == item.answer.strip() for item in items)


def test_generator_is_the_one_the_weights_were_trained_on() -> None:
    """A changed text here means that the shipped weights and their scores no longer belong to the generator."""
    found = [synth.items(task, 1, 0)[0].answer for task in synth.TASKS]
    assert found == [
        "Shazo",
        "Raiche buys 7*2=14 pears. After that 14-8=6 pears are left. #### 6",
        "drekra turtle droumil.",
    ]


def test_conversations_are_chat_messages() -> None:
    some = synth.conversations(30, 1)
    assert some == synth.conversations(30, 1) and len(some) == 30
    for conversation in some:
        assert [message["role"] for message in conversation] == ["user", "assistant"] * (len(conversation) // 2)
        assert all(message["content"] == message["content"].strip() != "" for message in conversation)


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="choose one of reading, arithmetic, dialogue"):
        synth.items("poetry", 1, 0)
    with pytest.raises(ValueError, match="choose train or test"):
        synth.items("reading", 1, 0, "dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="drill"):
        synth.document(Random(0), "poetry")
