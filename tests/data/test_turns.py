"""Conversations of every form become one, and go through the chat template."""

import json

import pytest

from polybit.core.runtime import PolybitError
from polybit.data.text import has_chat_template, read_corpus, renderer
from polybit.data.turns import document_of, documents_of, plain_text, read_messages
from tests.evals.tiny import tokenizer

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
TOOLS = [
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    {"role": "assistant", "content": "It is sunny."},
]


QAS = [
    {"id": "a", "question": " Who?", "answers": [{"text": "Ann", "answer_start": 0}, {"text": "A", "answer_start": 0}]},
    {"id": "b", "question": "Why?", "is_impossible": True, "answers": []},
    {"id": "c", "question": "What?", "answers": [{"text": "tea", "answer_start": 9}]},
]


def test_a_passage_is_read_once_with_the_questions_it_answers():
    talk = [
        {"role": "user", "content": "Ann made tea.\nWho?"},
        {"role": "assistant", "content": "Ann"},
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "tea"},
    ]
    article = {"title": "Tea", "paragraphs": [{"context": "Ann made tea.", "qas": QAS}, {"context": "No.", "qas": []}]}
    assert documents_of(article, "Entry 1") == [talk, [{"role": "user", "content": "No."}]]
    flat = {"context": "Ann made tea.", "question": "Who?", "answers": {"text": ["Ann"], "answer_start": [0]}}
    assert documents_of(flat, "Row 1") == [talk[:2]]
    assert documents_of({"text": "plain"}, "Row 1") == ["plain"]
    with pytest.raises(PolybitError, match="Entry 1 has a passage without 'context'"):
        documents_of({"paragraphs": [{"qas": QAS}]}, "Entry 1")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]},
        {"conversation": [{"role": "human", "value": "hi"}, {"role": "bot", "value": "yo"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, TALK[1]]},
        {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "h"}, "i"]}, TALK[1]]},
        # as tables give rows back: every turn has every field
        {"messages": [{**turn, "tool_calls": None, "name": None} for turn in TALK]},
        {"prompt": "hi", "response": "yo"},
        {"prompt": "hi", "chosen": "yo", "rejected": "no"},
        {"chosen": TALK, "rejected": TALK[:1]},
        {"instruction": "hi", "input": "", "output": "yo"},
    ],
)
def test_one_form_inside(row):
    assert document_of(row, "Row 1") == TALK


def test_an_instruction_keeps_what_it_is_about():
    row = {"instruction": "Translate.", "input": "Hund", "output": "dog"}
    assert document_of(row, "Row 1")[0]["content"] == "Translate.\n\nHund"


def test_tool_turns_reach_the_template():
    made = tokenizer()
    made.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}"
        "{% for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments.city }}>{% endfor %}"
        ";{% endfor %}"
    )
    messages = read_messages(TOOLS, "Row 1")
    wanted = "user:How is it?;assistant:<weather Paris>;tool:sunny;assistant:It is sunny.;"
    assert has_chat_template(made) and renderer(made)(messages) == wanted
    assert messages[2]["tool_call_id"] == "c1"
    assert plain_text(messages).split("\n")[1] == '{"name": "weather", "arguments": {"city": "Paris"}}'


def test_what_a_template_refuses_is_one_sentence(tmp_path):
    made = tokenizer()
    made.chat_template = "{{ raise_exception('roles must alternate\\nuser/assistant') }}"
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": TOOLS}))
    with pytest.raises(
        PolybitError, match=r"cannot write a conversation of user, assistant, tool .roles must alternate"
    ):
        read_corpus(path, made)


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "type 'image_url', and only texts"),
        ({"role": "user", "content": None}, "one message has 'role', 'content'"),
        ({"role": 3, "content": "x"}, "one message has"),
        ("hi", "one message has str"),
        ({"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}, "no function with a name"),
        ({"role": "assistant", "content": None, "tool_calls": "x"}, "must be a list"),
    ],
)
def test_what_cannot_be_read_is_said(turn, words):
    with pytest.raises(PolybitError, match=words):
        read_messages([turn], "Row 1")
