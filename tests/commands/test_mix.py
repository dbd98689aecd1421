"""`polybit mix` and `--mix`: a user's path, what is written can be read, mistakes are one sentence."""

import json

import pytest

from polybit.cli import main
from polybit.compress.mix_files import read_mix
from polybit.core.journal import Journal
from polybit.core.runtime import PolybitError


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("texts")
    stories = [
        f"Tom went to the {place} with {n} friends and was happy." for n in range(60) for place in ("sea", "zoo")
    ]
    sums = [f"What is {a} plus {b}? It is {a + b}." for a in range(12, 30) for b in range(31, 39)]
    (directory / "stories.txt").write_text("<|endoftext|>".join(stories))
    (directory / "few.txt").write_text("Tom went home.")
    rows = [{"question": row.split("?")[0] + "?", "answer": row.split("? ")[1]} for row in sums]
    (directory / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return directory


def test_search_verify_and_use(tiny_llama, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(texts)
    flags = ["--general", "stories.txt", "--tasks", "sums.jsonl", "--window", "24", "--samples", "12"]
    record = tmp_path / "mix.json"
    main(["mix", str(tiny_llama), *flags, "--verify", "--seeds", "2", "--method", "rtn", "--json", str(record)])
    printed = capsys.readouterr().out
    assert "regret of literal" in printed and "--mix" in printed
    numbers = json.loads(record.read_text())["numbers"]
    assert numbers["others"]["literal"]["weights"] == {"stories.txt": 0.0, "sums.jsonl": 1.0}
    assert len(numbers["verified"]["points"]) >= 5 and not list(tmp_path.glob("*.partial"))
    assert sum(read_mix(str(record)).values()) == pytest.approx(1)


@pytest.mark.parametrize("spec", ["a.txt", "a.txt=x", "=1", "a=0", "a=1,a=2", "a=-1", "a=nan", "", "no.json"])
def test_unreadable_mixtures(spec):
    with pytest.raises(PolybitError) as caught:
        read_mix(spec)
    assert "\n" not in str(caught.value) and "--mix" in str(caught.value)


def test_shares_are_read():
    assert read_mix("a.txt=1, b=c.txt=3,z=0") == {"a.txt": 1.0, "b=c.txt": 3.0}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--general", "stories.txt", "--tasks", "stories.txt"], "given twice"),
        (["--general", "stories.txt", "--tasks", "sums.jsonl", "--samples", "0"], "--samples 0"),
        (["--general", "stories.txt", "--tasks", "nothing.txt"], "nothing.txt"),
        (["--general", "stories.txt", "--tasks", "few.txt"], "few.txt"),
        (["--general", "stories.txt", "--tasks", "sums.jsonl", "--step", "0.3"], "does not divide"),
        (["--general", "stories.txt"], "tasks"),
    ],
)
def test_mistakes_are_one_sentence(tiny_llama, texts, flags, words, capsys, monkeypatch):
    monkeypatch.chdir(texts)
    with pytest.raises(SystemExit) as caught:
        main(["mix", str(tiny_llama), "--window", "24", *flags])
    assert caught.value.code not in (0, None)
    assert words in " ".join(capsys.readouterr().err.split())


def test_journal_goes_on_and_refuses_another_run(tmp_path):
    path = tmp_path / "j.json"
    Journal(path, {"bits": 3}).put("a", [1.5])
    assert Journal(path, {"bits": 3}).done == {"a": [1.5]}
    assert Journal(path, {"bits": 4}, restart=True).done == {}
    with pytest.raises(PolybitError, match="another bits"):
        Journal(path, {"bits": 4})
    path.write_text("broken")
    with pytest.raises(PolybitError, match="no journal"):
        Journal(path, {"bits": 3})
