"""Every layout of SQuAD is read alike, and questions are never cut."""

import json

import pytest

from polybit.core.runtime import PolybitError
from polybit.data import synth
from polybit.data.spans import prompt_windows, span_targets, span_windows
from polybit.data.squad import Answer, Asked, SquadFile, choose, write_squad
from polybit.hub.models import resolve


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve("tinychat"))


def written(path, data, **more):
    path.write_text(json.dumps({"version": "1.1", "data": data, **more}), encoding="utf-8")
    return SquadFile(path)


def test_every_layout(tmp_path):
    row = {"id": "q", "question": " Who? ", "answers": [{"text": "Ann", "answer_start": 0}]}
    layouts = {
        "v1": [{"title": "t", "paragraphs": [{"context": "Ann sings.", "qas": [row]}]}],
        "columns": [
            {
                "paragraphs": [
                    {"context": "Ann sings.", "qas": [row | {"answers": {"text": ["Ann"], "answer_start": [0]}}]}
                ]
            }
        ],
        "korquad2": [
            {
                "title": "t",
                "context": "Ann sings.",
                "raw_html": "<p>",
                "qas": [{"id": "q", "question": "Who?", "answer": {"text": "Ann", "answer_start": 0}}],
            }
        ],
    }
    for name, data in layouts.items():
        file = written(tmp_path / f"{name}.json", data)
        assert file.questions() == [Asked("q", "Ann sings.", "Who?")], name
        assert file.answers() == {"q": (Answer("Ann", 0),)}, name


def test_impossible_questions_have_no_answer(tmp_path):
    row = {"id": 7, "question": "Who?", "answers": [], "plausible_answers": [{"text": "x"}], "is_impossible": True}
    file = written(tmp_path / "v2.json", [{"paragraphs": [{"context": "c", "qas": [row]}]}])
    assert file.answers() == {"7": ()}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "not JSON"),
        ("[]", 'no list "data"'),
        ('{"data": []}', "holds no question"),
        ('{"data": [3]}', "needs 'paragraphs'"),
        ('{"data": [{"paragraphs": [{"context": 1}]}]}', "lacks 'context' or 'qas'"),
        ('{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": 1}]}]}]}', "lacks 'id' or 'question'"),
    ],
)
def test_malformed_files(tmp_path, content, sentence):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(PolybitError, match=sentence):
        SquadFile(path).questions()


def test_missing_file_and_repeated_id(tmp_path):
    with pytest.raises(PolybitError, match="does not exist"):
        SquadFile(tmp_path / "none.json").questions()
    row = {"id": "q", "question": "Who?"}
    with pytest.raises(PolybitError, match="repeats the id of 1"):
        written(tmp_path / "x.json", [{"paragraphs": [{"context": "c", "qas": [row, row]}]}]).questions()


def test_choice_is_seeded_and_in_order(tmp_path):
    asked = write_squad(tmp_path / "r.json", synth.items("reading", 30, 1)).questions()
    assert choose(asked, None) == asked == choose(asked, 99)
    some = choose(asked, 10, 3)
    assert some == choose(asked, 10, 3) != choose(asked, 10, 4)
    assert [asked.index(one) for one in some] == sorted(asked.index(one) for one in some)


def long_question():
    return Asked("q", " ".join(f"Word number {n} is {n * n}." for n in range(60)), "What is word number seven?")


def test_prompt_windows_cover_the_text_and_keep_the_question(tokenizer):
    one = long_question()
    whole = prompt_windows(tokenizer, one, room=None)
    assert len(whole) == 1
    windows = prompt_windows(tokenizer, one, room=200, stride=20)
    assert len(windows) > 1
    seen = ""
    for ids in windows:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert len(ids) <= 200 and one.question in text
        seen += text
    assert all(f"Word number {n} is {n * n}." in seen for n in range(60))


def test_span_windows_point_into_the_text(tokenizer):
    one = long_question()
    windows = span_windows(tokenizer, [one], length=120, stride=30)
    assert len(windows) > 1 and all(len(window.ids) <= 120 for window in windows)
    covered = {place for window in windows for offset in window.offsets if offset for place in range(*offset)}
    blank = {n for n, character in enumerate(one.context) if character == " "}
    assert covered | blank == set(range(len(one.context)))
    question = tokenizer(one.question, add_special_tokens=False)["input_ids"]
    for window in windows:
        inside = [n for n, place in enumerate(window.offsets) if place]
        head = [i for i in window.ids[: inside[0]] if i not in tokenizer.all_special_ids]
        assert head == question


def test_span_targets_are_the_answer(tokenizer):
    one = long_question()
    text = "33 is 1089"
    answers = {"q": (Answer(text, one.context.index(text)),)}
    windows = span_windows(tokenizer, [one], length=120, stride=60)
    targets = span_targets(windows, [one], answers)
    found = 0
    for window, (first, last) in zip(windows, targets, strict=True):
        if (first, last) != (0, 0):
            found += 1
            assert one.context[window.offsets[first][0] : window.offsets[last][1]].strip() == text
    assert 1 <= found < len(windows)
    assert span_targets(windows, [one], {"q": ()}) == [(0, 0)] * len(windows)


def test_a_question_without_room_is_refused(tokenizer):
    one = Asked("long", "Some text.", "Why " + "oh why " * 60 + "?")
    with pytest.raises(PolybitError, match="never cut"):
        span_windows(tokenizer, [one], length=40)
    one = Asked("long", "Some text. " * 50, one.question)
    with pytest.raises(PolybitError, match="never cut"):
        prompt_windows(tokenizer, one, room=60)
