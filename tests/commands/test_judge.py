"""`polybit judge` as a user runs it: offline, with an endpoint, killed half way, with wrong input."""

import json

import pytest

from polybit.acts.judge_rows import Entrant, parse_entrant, row_names
from polybit.cli import main
from polybit.core.runtime import PolybitError
from tests.hub.endpoint import serve


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("judge") / "rtn3"
    main(["quantize", str(tiny_llama), "--out", str(out), "--method", "rtn", "--bits", "3", "--no-measure",
          "--samples", "4", "--window", "32", "--calibration", "embedded"])  # fmt: skip
    return out


@pytest.fixture
def questions(tmp_path):
    rows = [{"question_id": n, "category": "math", "turns": [f"Say {n}.", "Again?"]} for n in range(20)]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def run(checkpoint, questions, out, *more):
    main(["judge", str(checkpoint), "--questions", str(questions), "--out", str(out), "--max-tokens", "8", *more])
    return json.loads((out / "run.json").read_text())["numbers"]


def failing(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(["judge", *map(str, arguments)])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_offline(checkpoint, questions, tmp_path, capsys):
    numbers = run(checkpoint, questions, tmp_path / "out")
    rows = numbers["rows"]
    assert list(rows) == ["float", "rtn3"] and numbers["fidelity_baseline"] == "rtn3"
    assert rows["float"]["closeness"]["exact"]["value"] == 1 and rows["rtn3"]["closeness"]["exact"]["value"] < 1
    assert rows["rtn3"]["closeness"]["nats"]["value"] < rows["float"]["closeness"]["nats"]["value"]
    printed = capsys.readouterr().out
    assert "not quality" in printed and "rtn3" in printed
    frozen = (tmp_path / "out" / "answers").glob("*.jsonl")
    assert sum(len(path.read_text().splitlines()) for path in frozen) == 40
    again = run(checkpoint, questions, tmp_path / "out")
    assert again == numbers


def test_the_float_model_finds_its_own_answers_likely(questions, tmp_path):
    out = tmp_path / "out"
    main(["judge", "again=tinychat", "--questions", str(questions), "--out", str(out), "--max-tokens", "16",
          "--limit", "3"])  # fmt: skip
    rows = json.loads((out / "run.json").read_text())["numbers"]["rows"]
    for row in rows.values():  # read back without its first blank an answer would cost nats per token, not hundredths
        assert row["closeness"]["exact"]["value"] == 1 and row["closeness"]["nats"]["value"] > -0.5


def test_with_an_endpoint(checkpoint, questions, tmp_path):
    pytest.importorskip("openai")

    def rule(messages):
        text = messages[-1]["content"]
        return "Rating: [[7]]" if "assistant A" not in text else "I am torn. [[C]]"

    with serve(rule) as judge:
        flags = ["--endpoint", judge.url, "--judge", "j", "--mode", "pair,single,fidelity", "--limit", "6"]
        numbers = run(checkpoint, questions, tmp_path / "out", *flags)
        row = numbers["rows"]["rtn3"]
        assert row["pair"]["tie"]["value"] == 1 and row["pair"]["games"] == 12
        assert row["single"]["mean"]["value"] == 7 and row["single"]["grades"] == 12
        asked = len(judge.asked)
        assert run(checkpoint, questions, tmp_path / "out", *flags) == numbers
        assert len(judge.asked) == asked, "a second run asks nothing"
        said = json.dumps(judge.asked)
    assert "rtn3" not in said and "float" not in said and "polybit" not in said
    lines = [json.loads(line) for line in (tmp_path / "out" / "verdicts.jsonl").read_text().splitlines()]
    assert {line["mode"] for line in lines} == {"pair", "single", "fidelity"}


def test_an_endpoint_that_dies_is_gone_on_with(checkpoint, questions, tmp_path, capsys):
    pytest.importorskip("openai")
    healthy = []

    def rule(messages):
        healthy.append(1)
        return (500, {"error": {"message": "worn out"}}) if 10 < len(healthy) < 40 else "[[A]]"

    with serve(rule) as judge:
        flags = [
            "--endpoint",
            judge.url,
            "--judge",
            "j",
            "--mode",
            "pair",
            "--retries",
            "0",
            "--concurrency",
            "1",
            "--limit",
            "6",
        ]
        with pytest.raises(SystemExit):
            run(checkpoint, questions, tmp_path / "out", *flags)
        assert "worn out" in (error := capsys.readouterr().err) and "10 of" in error
        healthy += [1] * 40
        numbers = run(checkpoint, questions, tmp_path / "out", *flags)
    assert numbers["rows"]["rtn3"]["pair"]["unanswered"] == 0
    assert numbers["rows"]["rtn3"]["pair"]["tie"]["value"] == 1, "a judge that always says A decides nothing"


def test_killed_while_answering(checkpoint, questions, tmp_path, monkeypatch):
    from polybit.evals import conversation

    whole = run(checkpoint, questions, tmp_path / "whole")
    calls = []
    real = conversation.converse

    def dying(lm, scripts, **rest):
        calls.append(len(scripts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(lm, scripts, **rest)

    monkeypatch.setattr(conversation, "converse", dying)
    with pytest.raises(SystemExit):
        run(checkpoint, questions, tmp_path / "out")
    assert run(checkpoint, questions, tmp_path / "out") == whole
    assert calls == [16, 4, 16, 16, 4], "the float answers and nothing else were done already"


def test_changed_answers_and_other_questions_are_refused(checkpoint, questions, tmp_path, capsys):
    out = tmp_path / "out"
    run(checkpoint, questions, out)
    path = next((out / "answers").glob("rtn3*.jsonl"))
    kept = path.read_text()
    path.write_text(kept.replace('"turns": ["', '"turns": ["x', 1))
    arguments = [checkpoint, "--questions", questions, "--out", out, "--max-tokens", "8"]
    assert "was changed after" in failing(capsys, *arguments)
    path.write_text(kept)
    assert "another max_tokens" in failing(capsys, *arguments[:-1], "9")
    rows = questions.read_text().splitlines()
    questions.write_text("\n".join(rows[:-1]))
    assert "another questions" in failing(capsys, *arguments)
    run(checkpoint, questions, out, "--restart")


def test_answers_from_a_file_can_be_the_baseline(checkpoint, questions, tmp_path):
    given = tmp_path / "gpt4.jsonl"
    given.write_text("\n".join(json.dumps({"question_id": n, "choices": [{"turns": ["a", "b"]}]}) for n in range(20)))
    main(["judge", str(checkpoint), f"GPT4={given}", "--questions", str(questions), "--out", str(tmp_path / "out"),
          "--max-tokens", "8", "--baseline", "GPT4", "--json", str(tmp_path / "n.json")])  # fmt: skip
    numbers = json.loads((tmp_path / "n.json").read_text())["numbers"]
    assert numbers["fidelity_baseline"] == "GPT4" and "fidelity" in numbers["rows"]["rtn3"]


def test_wrong_flags(checkpoint, questions, tmp_path, capsys):
    base = ["--questions", questions, "--out", tmp_path / "o"]
    assert "no model to judge" in failing(capsys, *base)
    assert "--mode 'pear' is not known" in failing(capsys, checkpoint, *base, "--mode", "pear")
    assert "asks a judge" in failing(capsys, checkpoint, *base, "--mode", "single")
    assert "--timeout 0 is not possible" in failing(capsys, checkpoint, *base, "--timeout", "0")
    assert "is no file" in failing(capsys, checkpoint, "--questions", "none.jsonl", "--out", tmp_path / "o")
    assert "is no row" in failing(capsys, checkpoint, *base, "--baseline", "w9", "--max-tokens", "4", "--limit", "1")
    assert "without stored widths" in failing(
        capsys, "tinychat@w3", *base[:-1], tmp_path / "p", "--max-tokens", "4", "--limit", "1"
    )


def test_how_entrants_are_written():
    assert parse_entrant("QDPO=./a/b@w3,w2") == Entrant("QDPO", "./a/b", ("w3", "w2"))
    assert parse_entrant("./a@home") == Entrant(None, "./a@home", ())
    assert parse_entrant("org/name") == Entrant(None, "org/name", ())
    for wrong in ("float=x", "answers.jsonl", "A=b.jsonl@w3"):
        with pytest.raises(PolybitError):
            parse_entrant(wrong)
    many = ["w4", "w3"]
    assert row_names(Entrant(None, "x/my", ()), many, alone=True) == ["w4", "w3"]
    assert row_names(Entrant(None, "x/my", ()), many, alone=False) == ["my w4", "my w3"]
    assert row_names(Entrant("A", "x/my", ()), ["w4"], alone=False) == ["A"]
