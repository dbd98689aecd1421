"""`polybit eval` with multiple choice, the breakdown of flips and long conversations, on a tiny random model."""

import json

import pytest

from polybit.cli import main
from polybit.evals.choices import set_name


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("suites") / "rtn3"
    main(["quantize", str(tiny_llama), "--out", str(out), "--method", "rtn", "--bits", "3", "--no-measure",
          "--samples", "4", "--window", "32", "--calibration", "embedded"])  # fmt: skip
    return out


SMALL = ["--windows", "2", "--window", "32", "--text", "embedded-test", "--answers", "6", "--max-tokens", "10"]


def failing(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(["eval", *map(str, arguments)])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_choices_breakdown_and_talk(checkpoint, tmp_path, capsys):
    rows = [{"question": f"Where is {n}?", "choices": ["here", "there", "nowhere"], "answer": n % 3} for n in range(12)]
    (tmp_path / "places.jsonl").write_text("\n".join(map(json.dumps, rows)))
    places, numbers = tmp_path / "places.jsonl", tmp_path / "eval.json"
    main(["eval", str(checkpoint), *SMALL, "--choices", str(places), "--shots", "1", "--shots-from", str(places),
          "--form", "letters", "--breakdown", "--talk", "4", "--talk-count", "2", "--json", str(numbers)])  # fmt: skip
    found = json.loads(numbers.read_text())["numbers"]
    entry = found["choices"]["places"]
    assert entry["n"] == 12 and entry["form"] == "letters" and entry["shots"] == 1
    row = entry["presets"]["w3"]["acc"]
    assert row["flips"]["value"] == pytest.approx(row["correct_to_wrong"]["value"] + row["wrong_to_correct"]["value"])
    arms = found["presets"]["w3"]["breakdown"]["arms"]
    assert arms["float"]["damage"]["value"] == 0 and arms["quantized"]["damage"]["value"] > 0
    assert found["talk"]["turns"] == 4 and len(found["talk"]["presets"]["w3"]["own"]["rouge_l"]) == 4
    printed = capsys.readouterr().out
    for word in ("Questions with choices", "(iii) float's token", "Drift over 4 turns", "right → wrong"):
        assert word in printed


def test_wrong_flags(checkpoint, tmp_path, capsys):
    assert "--form 'essay' is not known" in failing(capsys, checkpoint, "--form", "essay")
    assert "1 sets, 0 sources" in failing(capsys, checkpoint, "--choices", "x.jsonl", "--shots", "2")
    assert "is no file" in failing(capsys, checkpoint, *SMALL, "--choices", "x.jsonl")
    assert "--talk -1 is not possible" in failing(capsys, checkpoint, "--talk", "-1")
    assert "no directory" in failing(capsys, checkpoint, "--lm-eval", "a", "--lm-eval-path", tmp_path / "none")
    talks = tmp_path / "t.jsonl"
    talks.write_text('{"messages": [{"role": "user", "content": "hi"}]}')
    assert "fewer than one talk of 9" in failing(capsys, checkpoint, *SMALL, "--talk", "9", "--talks", talks)


def test_sets_of_one_name_are_told_apart():
    assert set_name("mc/ARC-Easy/test.json", ["mc/ARC-Easy/test.json", "mc/piqa/test.json"]) == "ARC-Easy/test"
    assert set_name("csqa/dev_rand_split.jsonl", ["csqa/dev_rand_split.jsonl"]) == "dev_rand_split"


def test_suites_alone_measure_nothing_else(checkpoint, tmp_path, capsys):
    rows = [{"question": f"Where is {n}?", "choices": ["here", "there"], "answer": n % 2} for n in range(4)]
    (tmp_path / "places.jsonl").write_text("\n".join(map(json.dumps, rows)))
    places, numbers, html = tmp_path / "places.jsonl", tmp_path / "eval.json", tmp_path / "page.html"
    main(["eval", str(checkpoint), "--choices", str(places), "--json", str(numbers)])
    said = capsys.readouterr()
    assert "measuring questions with choices only" in said.err and "perplexity" not in said.out
    assert set(json.loads(numbers.read_text())["numbers"]) == {"choices"}
    main(["report", str(checkpoint), "--eval", str(numbers), "--out", str(html)])
    assert "Questions with choices" in html.read_text() and "What each width costs" not in html.read_text()
    main(["eval", str(checkpoint), "--tasks", "reading", "--items", "2", "--json", str(numbers)])
    said = capsys.readouterr()
    assert "reading" in said.out and "perplexity" not in said.out
    assert set(json.loads(numbers.read_text())["numbers"]) == {"reference", "presets"}
