"""`polybit report` on an alignment, from the records the verbs really write, and with wrong input."""

import json

import pytest

from polybit.acts.report import read_others, unused
from polybit.cli import main
from polybit.core.runtime import PolybitError

TEXT = ["--text", "embedded-test", "--windows", "2", "--window", "32", "--answers", "3", "--max-tokens", "8"]


@pytest.fixture(scope="module")
def records(tiny_llama, tmp_path_factory):
    """Two checkpoints of one model, one eval of each, and a judge's run over both."""
    room = tmp_path_factory.mktemp("report")
    for name, bits in (("rtn2", "2"), ("rtn4", "4")):
        main(["quantize", str(tiny_llama), "--out", str(room / name), "--method", "rtn", "--bits", bits, "--no-measure",
              "--samples", "4", "--window", "32", "--calibration", "embedded"])  # fmt: skip
        main(["eval", str(room / name), *TEXT, "--breakdown", "--json", str(room / f"{name}.json")])
    questions = room / "questions.jsonl"
    questions.write_text("\n".join(json.dumps({"question_id": n, "turns": [f"Say {n}.", "More?"]}) for n in range(3)))
    main(["judge", f"RTN2={room / 'rtn2'}", f"RTN4={room / 'rtn4'}", "--questions", str(questions), "--max-tokens", "6",
          "--out", str(room / "judged")])  # fmt: skip
    return room


def failing(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(["report", *map(str, arguments)])
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_before_and_after(records, tmp_path):
    page, kept = tmp_path / "page.html", tmp_path / "page.json"
    main(["report", str(records / "rtn4"), "--eval", str(records / "rtn4.json"), "--before",
          f"RTN2={records / 'rtn2.json'}", "--judge", str(records / "judged" / "run.json"), "--out", str(page),
          "--json", str(kept)])  # fmt: skip
    html = page.read_text()
    for title in ("Before and after", "Margins", "Fidelity of the answers", "Conversations side by side", "the flip"):
        assert title.lower() in html.lower(), title
    assert html.count("<mark>") > 3 and "<td>RTN2</td>" in html and "<td>rtn4</td>" in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert set(json.loads(kept.read_text())["before"]) == {"RTN2"}


def test_judged_answers_alone(records, tmp_path):
    page = tmp_path / "page.html"
    main(["report", str(records / "rtn4"), "--judge", str(records / "judged" / "run.json"), "--out", str(page)])
    assert "not quality" in page.read_text() and "What each width costs" not in page.read_text()


def test_wrong_input(records, tmp_path, capsys):
    rtn4, out = records / "rtn4", ("--out", tmp_path / "page.html")
    good = ("--eval", records / "rtn4.json")
    assert "is not what `polybit judge --json` writes" in failing(capsys, rtn4, "--judge", records / "rtn4.json", *out)
    assert "does not exist" in failing(capsys, rtn4, *good, "--align", tmp_path / "none.json", *out)
    assert "does not exist" in failing(capsys, rtn4, *good, "--before", "RTN=none.json", *out)
    assert "holds no measurement" in failing(capsys, rtn4, "--before", records / "rtn2.json", *out)
    assert "is no checkpoint" in failing(capsys, tmp_path / "nowhere", "--judge", records / "judged/run.json", *out)
    other = json.loads((records / "rtn2.json").read_text())
    other["numbers"]["text"]["windows"] += 1
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert "another text" in failing(capsys, rtn4, *good, "--before", tmp_path / "other.json", *out)
    assert not (tmp_path / "page.html").exists()


def test_names_of_rows(records):
    path = records / "rtn2.json"
    assert list(read_others(f"A={path}, {path}")) == ["A", "rtn2"]
    with pytest.raises(PolybitError, match="two rows called 'rtn2'"):
        read_others(f"{path},{path}")
    assert read_others(None) == {} and unused("rtn2", {"rtn2": {}}) == "rtn2 (after)"
