"""Rows to train on: which tokens are learnt, that nothing is cut, that the end is learnt too."""

import json

import pytest

from polybit.core.runtime import PolybitError
from polybit.data.lessons import Lesson, Lessons, batch, read_lessons


@pytest.fixture(scope="module")
def tokenizer():
    from polybit.hub.load import load_tokenizer
    from polybit.hub.tiny import path

    return load_tokenizer(str(path()))


@pytest.fixture
def squad(tmp_path):
    def make(*rows):
        qas = [
            {"id": str(n), "question": q, "answers": [{"text": a, "answer_start": 0}]} for n, (q, a) in enumerate(rows)
        ]
        file = tmp_path / "squad.json"
        file.write_text(json.dumps({"data": [{"paragraphs": [{"context": "Ada has a red boat .", "qas": qas}]}]}))
        return str(file)

    return make


def said(tokenizer, row):
    return tokenizer.decode([i for i, learn in zip(row.ids, row.learn, strict=True) if learn])


def test_squad_learns_the_answer_and_its_end(tokenizer, squad):
    found = read_lessons(squad(("What colour is the boat of Ada ?", "red")), tokenizer, length=256)
    (row,) = found.rows
    assert said(tokenizer, row).replace(tokenizer.eos_token, "").strip() == "red"
    assert row.ids[-1] == tokenizer.eos_token_id and row.learn[-1]
    assert "What colour is the boat of Ada" in tokenizer.decode(row.ids)


def test_squad_without_chat_template(tokenizer, squad):
    import copy

    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    (row,) = read_lessons(squad(("What colour ?", "red")), plain, length=256).rows
    text = plain.decode(row.ids)
    assert "Question: What colour ?" in text and text.rstrip().endswith(plain.eos_token)
    assert said(plain, row).replace(plain.eos_token, "").strip() == "red"


def test_rows_that_do_not_fit_are_left_out_and_counted(tokenizer, squad):
    file = squad(("What colour ?", "red"), ("What " * 200 + "?", "red"))
    found = read_lessons(file, tokenizer, length=64)
    assert len(found.rows) == 1 and found.too_long == 1
    with pytest.raises(PolybitError, match="a question is never cut"):
        read_lessons(file, tokenizer, length=8)


def test_conversations_learn_what_the_assistant_says(tokenizer, tmp_path):
    talk = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "good day"}]
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": talk}) + "\n")
    (row,) = read_lessons(str(file), tokenizer, length=64).rows
    assert said(tokenizer, row).replace(tokenizer.eos_token, "").strip() == "good day"


def test_plain_text_learns_everything(tokenizer, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("Ada has a red boat . " * 40)
    found = read_lessons(str(file), tokenizer, length=16)
    assert all(row.learn == [True] * 16 and len(row.ids) == 16 for row in found.rows)


def test_data_without_answers_is_refused(tokenizer, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    with pytest.raises(PolybitError, match="no answers to learn from"):
        read_lessons(str(file), tokenizer, length=64)


def test_embedded_rows_differ_by_seed_and_repeat_by_it(tokenizer):
    one, again, other = (read_lessons("embedded", tokenizer, length=256, count=6, seed=s) for s in (0, 0, 1))
    assert one.rows == again.rows and one.rows != other.rows


def test_batch_marks_real_and_learnt_tokens():
    made = batch([Lesson([5, 6, 7], [False, True, True]), Lesson([8], [False])], 0)
    assert made["ids_BT"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert made["mask_BT"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert made["learn_BT"].int().tolist() == [[0, 1, 1], [0, 0, 0]]


def test_split_shares_no_row():
    rows = [Lesson([n], [True]) for n in range(10)]
    first, last = Lessons(rows, source="x").split(3, seed=1)
    assert len(first.rows) == 7 and sorted(r.ids[0] for r in first.rows + last.rows) == list(range(10))
    with pytest.raises(PolybitError, match="cannot give 10 held-out ones"):
        Lessons(rows, source="x").split(10)
