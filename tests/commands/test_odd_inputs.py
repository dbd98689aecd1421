"""Odd inputs of every kind end in one sentence; what nobody foresaw too, and its traceback is there when asked for."""

import fcntl
import json
import os
import shutil

import pytest

import polybit.commands.doctor
from polybit import cli
from polybit.cli import main

FILES = {
    "empty.json": b"",
    "binary.json": bytes(range(256)),
    "deep.json": b"[" * 200_000,
    "number.json": b'{"numbers": ' + b"9" * 6000 + b"}",
    "list.json": b"[1, 2]",
    "half.json": b'{"verb": "eval", "numbers": {}}',
    "hollow.json": b'{"verb": "eval", "numbers": {"presets": {"w4": 3}, "text": 1}, "config": {}, "machine": {}}',
    "array.json": b'{"verb": "eval", "numbers": [], "config": [], "machine": 3}',
}


def sentence(tokens, capsys):
    """What is said on stderr: one line of polybit's."""
    with pytest.raises(SystemExit) as ended:
        main([str(token) for token in tokens])
    said = capsys.readouterr().err
    assert ended.value.code and said.startswith("polybit: ") and said.count("\n") == 1, said
    assert "fault of polybit" not in said
    return said


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_plans_reports_or_texts(name, tmp_path, capsys):
    (tmp_path / name).write_bytes(FILES[name])
    sentence(["report", tmp_path, "--eval", tmp_path / name, "--out", tmp_path / "page.html"], capsys)
    sentence(["quantize", "tinychat", "--plan", tmp_path / name, "--out", tmp_path / "out"], capsys)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_names_no_file_can_have(tmp_path, capsys):
    long = "x" * 5000
    assert "no such file" in sentence(["--config", long, "plan", "tinychat"], capsys)
    sentence(["generate", long, "--prompt", "Hi"], capsys)
    sentence(["generate", "tinychat", "--prompt", "Hi", "--max-tokens", "1", "--json", ""], capsys)


def test_a_prompt_with_half_a_character_is_answered(capsys):
    main(["generate", "tinychat", "--prompt", "Hello \udcff", "--max-tokens", "2"])
    assert capsys.readouterr().out.strip()


def test_what_nobody_foresaw_is_one_sentence_too(monkeypatch, capsys):
    def broken(self, *_):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(polybit.commands.doctor, "keep", broken)
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    said = capsys.readouterr().err
    assert ended.value.code == 1 and said.count("\n") == 1 and "ZeroDivisionError: two lines; this is a fault" in said
    monkeypatch.setenv(cli.TRACEBACK, "1")
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


OUTPUTS = [
    ["plan", "tinychat", "--json"],
    ["columns", "tinychat", "--bits", "3", "--out"],
    ["allocate", "tinychat", "--bits", "4", "--out"],
    ["allocate", "tinychat", "--bits", "4", "--report"],
    ["mix", "tinychat", "--general", "embedded", "--tasks", "wikitext2", "--json"],
    ["route", "tinychat", "--prompts", "embedded", "--page"],
    ["attack", "tinychat", "--json"],
    ["attack", "tinychat", "--report"],
    ["bench", "linear", "--chart"],
    ["report", "somewhere", "--out"],
    ["report", "somewhere", "--json"],
]


@pytest.mark.parametrize("words", OUTPUTS, ids=lambda words: f"{words[0]} {words[-1]}")
def test_a_file_that_cannot_be_written_is_refused_before_the_work(words, tmp_path, capsys, monkeypatch):
    assert "is a directory" in sentence([*words, tmp_path], capsys)
    assert "too long" in sentence([*words, tmp_path / ("x" * 250)], capsys)
    assert "no name in UTF-8" in sentence([*words, f"{tmp_path}/caf\udce9"], capsys)
    monkeypatch.setattr("polybit.options.checks.os.access", lambda *_: False)  # root may write everywhere
    assert "read-only" in sentence([*words, tmp_path / "new.json"], capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "unknown"}, "no model can be built"),
        ({"vocab_size": -5}, "no model can be built"),
        ({"rope_scaling": {"type": 5}}, "no model can be built"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"architectures": "BertModel"}, "is a BertModel"),
    ],
)
def test_configurations_of_other_types(changes, said, tiny_llama, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps(config))
    assert said in sentence(["plan", model], capsys)


def test_a_tokenizer_without_entries(tiny_llama, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    told = json.loads((model / "tokenizer.json").read_text())
    told["added_tokens"], told["model"]["vocab"], told["model"]["merges"] = [], {}, []
    (model / "tokenizer.json").write_text(json.dumps(told))
    assert "empty vocabulary" in sentence(["generate", model, "--prompt", "Hi"], capsys)


def test_names_that_are_no_utf8(tiny_llama, tmp_path, capsys):
    model = tmp_path / "caf\udce9"
    shutil.copytree(tiny_llama, model)
    assert "no name in UTF-8" in sentence(["plan", model], capsys)
    assert "no name in UTF-8" in sentence(["quantize", tiny_llama, "--out", tmp_path / "q\udce9"], capsys)
    text = tmp_path / "t\udce9.txt"
    text.write_text("words")
    assert "no name in UTF-8" in sentence(
        ["quantize", tiny_llama, "--out", tmp_path / "q", "--calibration", text], capsys
    )


@pytest.mark.parametrize("words", [["sweep", "--axis", "bits=3,4"], ["study"], ["frontier"]])
def test_two_runs_do_not_write_to_one_output(words, tiny_llama, tmp_path, capsys, monkeypatch):
    """The three that write several files of their own; a lock of another process is one of another descriptor here."""
    held = os.open(tmp_path / ".out.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    said = sentence([words[0], tiny_llama, "--out", tmp_path / "out", *words[1:]], capsys)
    os.close(held)
    assert "another process is writing" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quantize", "tinychat", "--out", "OUT", "--seed", "99999999999999999999"], "--seed 9999"),
        (["columns", "tinychat", "--bits", "3", "--out", "OUT", "--seed", "-1"], "--seed -1"),
        (["frontier", "tinychat", "--out", "OUT", "--seed", "-1"], "--seed -1"),
        (["attack", "tinychat", "--seeds", "0,99999999999999999999"], "--seeds 9999"),
        (["sweep", "tinychat", "--out", "OUT", "--axis", "bits=4,4"], "'bits=4' twice"),
        (["train", "tinychat", "--out", "OUT", "--presets", "=w8a8,B=w4"], "no name"),
        (["train", "tinychat", "--out", "OUT", "--presets", "../A=w8,B=w4", "--method", "independent"], "no / in it"),
    ],
)
def test_values_no_run_can_have(words, said, tmp_path, capsys):
    assert said in sentence([str(tmp_path / "out") if word == "OUT" else word for word in words], capsys)
    assert not list(tmp_path.iterdir())
