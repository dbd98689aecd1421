"""Chats: prompts as files write them, and masks that cover what the assistant wrote and nothing else."""

import json

import pytest

from polybit.core.runtime import PolybitError
from polybit.data.chat import encode_conversation, encode_prompt, read_prompts
from tests.evals.tiny import tokenizer

USER = {"role": "user", "content": "hi"}
TALK = [USER, {"role": "assistant", "content": "yo."}, {"role": "user", "content": "b"}]
REPLY = {"role": "assistant", "content": "bye"}


def test_prompts_from_files(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("hi\n\n  two words \n")
    assert read_prompts(path) == [[USER], [{"role": "user", "content": "two words"}]]
    assert read_prompts(path, chat=False) == ["hi", "two words"]
    path = tmp_path / "p.jsonl"
    rows = [{"prompt": "hi"}, {"question": "hi", "answer": "x"}, {"messages": [*TALK, REPLY]}, "hi"]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert read_prompts(path) == [[USER], [USER], TALK, [USER]]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.txt", "\n", "is empty"),
        ("p.md", "x", "'.md'"),
        ("p.jsonl", "{", "not JSON"),
        ("p.jsonl", '{"body": 1}', "has 'body'"),
        ("p.jsonl", "3", "has int"),
        ("p.jsonl", '{"messages": [{"role": "system", "content": "x"}]}', "no user message"),
    ],
)
def test_bad_prompt_files_are_refused(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(PolybitError, match=words):
        read_prompts(tmp_path / name)
    with pytest.raises(PolybitError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")


def test_prompt_tokens():
    made = tokenizer()
    assert made.decode(encode_prompt(made, TALK)) == "<s>[user]hi\n[assistant]yo.<end>\n[user]b\n[assistant]"
    assert made.decode(encode_prompt(made, "hi")) == "<s>hi"
    assert encode_prompt(made, "<s>hi") == encode_prompt(made, "hi")
    plain = tokenizer(bos=False, chat=False)
    assert plain.decode(encode_prompt(plain, TALK)) == "hi\nyo.\nb"
    assert encode_prompt(plain, "") == [2]
    double = tokenizer(chat=False)
    double.bos_token = "<end>"
    assert double.decode(encode_prompt(double, "hi")) == "hi"


def test_mask_is_what_the_assistant_wrote():
    made = tokenizer()
    ids, mask = encode_conversation(made, [*TALK, REPLY])
    assert made.decode(ids) == "<s>[user]hi\n[assistant]yo.<end>\n[user]b\n[assistant]bye<end>\n"
    assert made.decode([token for token, mine in zip(ids, mask, strict=True) if mine]) == "yo.<end>bye<end>"


def test_template_that_rewrites_history_is_refused():
    made = tokenizer()
    made.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(PolybitError, match="rewrites turn 2"):
        encode_conversation(made, [*TALK, REPLY])
    with pytest.raises(PolybitError, match="no chat template"):
        encode_conversation(tokenizer(chat=False), TALK)
