"""Text: what is read, what is refused and with which words, and windows that cut a stream without losing a token."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polybit.core.runtime import PolybitError
from polybit.data.stream import token_stream
from polybit.data.text import collapse, duplicate_warning, read_corpus, read_documents, read_windows, windows
from tests.evals.tiny import tokenizer


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def jsonl(path, *rows):
    return write(path, "\n".join(json.dumps(row) for row in rows) + "\n")


def test_text_file_is_split_at_endoftext_and_blank_lines_collapse(tmp_path):
    path = write(tmp_path / "a.txt", "one \n\n\n two\r\n<|endoftext|>\nthree\n<|endoftext|>\n  \n")
    assert read_documents(path) == ["one\n two", "three"]
    assert collapse("a<|endoftext|>b\n \n\nc") == "a\nb\nc"


def test_json_lines_of_every_form(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = jsonl(
        tmp_path / "a.jsonl",
        {"text": "plain"},
        {"messages": messages},
        {"prompt": "p", "response": "r"},
        {"question": "q", "answer": "a", "id": 3},
        "a bare string",
    )
    assert read_documents(path) == ["plain", "hi\nyo", "p\nr", "q\na", "a bare string"]
    corpus = read_corpus(path, tokenizer())
    assert corpus.documents[1] == "<s>[user]hi\n[assistant]yo<end>\n" and corpus.separator == ""


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "", "is empty"),
        ("a.txt", " \n\n<|endoftext|>\n", "is empty"),
        ("a.jsonl", "", "is empty"),
        ("a.txt", b"\x80\x81abc", "not UTF-8 .byte 0 is 0x80"),
        ("a.txt", "abc\x00def", "NUL bytes"),
        ("a.txt", "abc".encode("utf-16"), "not UTF-8"),
        ("a.md", "a,b", "'.md'"),
        ("a.csv", "a,b", "is empty"),
        ("a.csv", "a,b\n1,2", "keys 'a', 'b'"),
        ("a.jsonl", '{"text": "a"}\n{"text"', "Line 2 .* is not JSON"),
        ("a.jsonl", '{"body": "a", "title": "b"}', "keys 'body', 'title'"),
        ("a.jsonl", "[1, 2]", "is a list"),
        ("a.jsonl", '{"messages": []}', "an empty list"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "one message has 'role'"),
        ("a.jsonl", '{"messages": "hi"}', "is a str"),
        ("a.txt", "the same line\n" * 20, "repeats one document 20 times"),
        ("a.jsonl", '{"text": "the same"}\n' * 5, "repeats one document 5 times"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, name, content, words):
    with pytest.raises(PolybitError, match=words):
        read_documents(write(tmp_path / name, content))


def test_paths_and_names_that_do_not_exist(tmp_path):
    with pytest.raises(PolybitError, match="is a directory"):
        read_documents(tmp_path)
    with pytest.raises(PolybitError, match=r"does not exist.*embedded"):
        read_documents(tmp_path / "none.txt")
    with pytest.raises(PolybitError, match=r"does not exist.*embedded"):
        read_documents("wikitext3")


def test_datasets_behind_the_door(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    for name in ("wikitext2", "somebody/some-data:config:test"):
        with pytest.raises(PolybitError, match=r"polybit\[data\]"):
            read_documents(name)


def test_dataset_rows_arrive(monkeypatch):
    class Rows(list):
        take = staticmethod(lambda n: [{"text": "a row"}, {"text": "another"}][:n])

    class Library:
        load_dataset = staticmethod(lambda name, config, *, split, streaming: Rows())

    monkeypatch.setitem(__import__("sys").modules, "datasets", Library)
    assert read_documents("somebody/some-data") == ["a row", "another"]


def test_embedded_conversations_need_no_file():
    documents = read_documents("embedded")
    assert len(documents) > 100 and documents != read_documents("embedded-test")
    assert documents == read_documents("embedded")


def test_near_duplicates_warn_and_varied_text_does_not(tmp_path):
    rows = [{"text": f"On day {i} the old captain sailed his ship to the far harbour again."} for i in range(30)]
    assert "29 of 30 documents" in read_corpus(jsonl(tmp_path / "a.jsonl", *rows)).warnings[0]
    varied = [" ".join(f"{chr(97 + (i * j) % 23)}{i}{j}" for j in range(9)) for i in range(30)]
    assert duplicate_warning([row.translate({i: 97 + i % 7 for i in range(48, 58)}) for row in varied], "x") is None


def test_one_stream_not_line_by_line():
    ids = token_stream(tokenizer(), ["ab", "c"])
    assert tokenizer().decode(ids) == "ab\nc"


@given(st.integers(2, 40), st.integers(2, 12), st.booleans())
@settings(max_examples=60, deadline=None)
def test_windows_are_the_stream_in_order(total, length, has_bos):
    ids = torch.arange(100, 100 + total)
    bos, step = (7, length - 1) if has_bos else (None, length)
    if total < step:
        with pytest.raises(PolybitError, match=f"has {total} tokens but one window of {length} needs {step}"):
            windows(ids, length, bos=bos)
        return
    cut = windows(ids, length, bos=bos)
    assert cut.shape == (total // step, length)
    if has_bos:
        assert (cut[:, 0] == 7).all()
        cut = cut[:, 1:]
    assert torch.equal(cut.reshape(-1), ids[: total // step * step])


def test_windows_drawn_with_a_seed():
    ids = torch.arange(1000)
    every, first = windows(ids, 10, bos=None), windows(ids, 10, bos=None, count=5)
    assert torch.equal(first, every[:5])
    drawn = windows(ids, 10, bos=None, count=5, seed=1)
    assert torch.equal(drawn, windows(ids, 10, bos=None, count=5, seed=1))
    assert not torch.equal(drawn, windows(ids, 10, bos=None, count=5, seed=2))
    assert len({int(row[0]) for row in drawn}) == 5 and all(int(row[0]) % 10 == 0 for row in drawn)
    assert len(windows(ids, 10, bos=None, count=5000, seed=1)) == 100
    for wrong in ({"length": 1}, {"length": 10, "count": 0}):
        with pytest.raises(PolybitError):
            windows(ids, bos=None, **wrong)


def test_read_windows_in_one_call(tmp_path):
    path = write(tmp_path / "a.txt", "\n".join(f"line number {i} says {i * i}" for i in range(50)))
    cut_NT, warnings = read_windows(path, tokenizer(), 16, count=4)
    assert cut_NT.shape == (4, 16) and (cut_NT[:, 0] == 1).all() and warnings
    plain, _ = read_windows(path, tokenizer(bos=False), 16)
    assert tokenizer().decode(plain[0]) == "line number 0 sa"
