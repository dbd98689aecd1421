"""Odd inputs of every kind end in one sentence; what nobody foresaw too, and its traceback is there when asked for."""

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
