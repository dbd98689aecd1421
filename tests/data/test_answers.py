"""Task files: every format gives questions with answers, and the answer's tokens are the ones marked."""

import json

import pytest

from polybit.core.runtime import PolybitError
from polybit.data.answers import encode_exchange, encode_task, read_task
from polybit.hub.load import load_float
from polybit.hub.tiny import path

SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "Mills",
            "paragraphs": [
                {
                    "context": "The mill stood on a hill.",
                    "qas": [
                        {"id": "1", "question": "Where did it stand?", "answers": [{"text": "on a hill"}]},
                        {"id": "2", "question": "Who owned it?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def test_every_format(tmp_path):
    gsm = write(tmp_path / "gsm.jsonl", {"question": "2 and 3?", "answer": "2 + 3\n#### 5"})
    chat = write(
        tmp_path / "chat.jsonl",
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    )
    flat = write(tmp_path / "flat.jsonl", {"context": "A.", "question": "B?", "answers": {"text": ["C", "D"]}})
    nested = write(tmp_path / "squad.json", SQUAD)
    found = [read_task(name).exchanges for name in (gsm, chat, flat, nested)]
    assert [e[0].answer for e in found] == ["2 + 3\n#### 5", "Hello", "C", "on a hill"]
    assert found[3][0].asked[0]["content"] == "The mill stood on a hill.\nWhere did it stand?" and len(found[3]) == 1
    assert read_task(gsm).warnings and not read_task("arithmetic", count=9).warnings


def test_named_sets_draw_by_seed():
    one, same, other = (read_task("reading", count=12, seed=s).exchanges for s in (1, 1, 2))
    assert one == same != other and len(one) == 12


def test_marks_are_the_answers_tokens():
    _, tokenizer = load_float(str(path()))
    for name in ("arithmetic", "dialogue"):
        task = read_task(name, count=5)
        for exchange, (ids, marks) in zip(task.exchanges, encode_task(tokenizer, task), strict=True):
            said = tokenizer.decode([i for i, m in zip(ids, marks, strict=True) if m], skip_special_tokens=True)
            assert said.strip() == exchange.answer.strip()
            assert sum(marks[i] and not marks[i - 1] for i in range(1, len(marks))) == 1, "earlier turns do not count"
    ids, marks = encode_exchange(tokenizer, task.exchanges[0], most=4)
    assert len(ids) == len(marks) == 4 and marks[-1]


class Letters:
    """A tokenizer without a chat template: one token per letter."""

    chat_template = None
    bos_token_id = 1

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) for c in text]}


def test_without_a_chat_template(tmp_path):
    gsm = write(tmp_path / "gsm.jsonl", {"question": "Q", "answer": "A B"})
    ids, marks = encode_task(Letters(), read_task(gsm))[0]
    assert ids == [1, ord("Q"), 10, ord("A"), 32, ord("B")] and marks == [False] * 3 + [True] * 3


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"question": "Q"}, "Row 1 .* no answer"),
        ({"question": "Q", "answer": None}, "no answer in words"),
        ({"context": "A", "question": "Q", "answers": {"text": []}}, "no answer in words"),
        ({"messages": [{"role": "assistant", "content": "A"}]}, "does not end with an answer"),
    ],
)
def test_rows_without_an_answer(tmp_path, row, sentence):
    with pytest.raises(PolybitError, match=sentence):
        read_task(write(tmp_path / "bad.jsonl", row))
