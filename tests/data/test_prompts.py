"""Prompts from any source."""

import pytest

from polybit.core.runtime import PolybitError
from polybit.data.prompts import gather_prompts, user_turns


def test_a_table_of_questions_in_any_language(tmp_path):
    path = tmp_path / "chat.csv"
    path.write_text('Q,A,label\n"3박4일 놀러가고 싶다",여행은 언제나 좋죠.,0\n,leer,1\n"a, b",c,0\n', encoding="utf-8")
    found = gather_prompts(str(path), chat=True)
    assert [row[0]["content"] for row in found] == ["3박4일 놀러가고 싶다", "a, b"]
    assert gather_prompts(str(path), chat=False, limit=1) == ["3박4일 놀러가고 싶다"]


def test_a_table_without_questions_is_refused(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text("a\tb\n1\t2\n")
    with pytest.raises(PolybitError, match="columns a, b; name one"):
        gather_prompts(str(path), chat=True)


def test_files_are_read_as_prompts(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "one"}\n{"messages": [{"role": "user", "content": "two"}]}\n')
    assert [p[0]["content"] for p in gather_prompts(str(path), chat=True)] == ["one", "two"]


def test_questions_of_a_benchmark_give_their_first(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question_id": 81, "turns": ["Write a post.", "Rewrite it."]}\n')
    assert gather_prompts(str(tmp_path / "q.jsonl"), chat=True) == [[{"role": "user", "content": "Write a post."}]]
    assert gather_prompts(str(tmp_path / "q.jsonl"), chat=False) == ["Write a post."]


def test_every_user_turn_of_a_conversation_is_a_prompt():
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    assert [len(prompt) for prompt in user_turns(turns)] == [1, 3]


def test_a_named_set_gives_conversations():
    found = gather_prompts("embedded", chat=True, limit=5)
    assert len(found) == 5 and all(prompt[-1]["role"] == "user" for prompt in found)


def test_an_unknown_source_is_refused():
    with pytest.raises(PolybitError, match="does not exist"):
        gather_prompts("nowhere.jsonl", chat=True)
