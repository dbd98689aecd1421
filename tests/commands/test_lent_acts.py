"""allocate, mix and columns on a model that does not fit: read a block at a time, with the numbers of one in memory.

Kinds: reference (the same act with the model in memory), refusals.
"""

import json

import pytest

from polybit.cli import main
from tests.commands.test_allocate import story, texts  # noqa: F401 - a fixture

SMALL = 0.0002  # GB; the tiny model has 0.4 MB


def numbers(folder, *words):
    """What an act writes with --json."""
    main([*words, "--json", str(folder / "run.json")])
    return json.loads((folder / "run.json").read_text())["numbers"]


def close(one, other):
    """Numbers alike to rounding, everything else equal."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"cost"}:
            close(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            close(a, b)
    else:
        assert one == (pytest.approx(other, rel=1e-4, abs=1e-7) if isinstance(other, float) else other)


@pytest.mark.parametrize("how", ["exact", "gradient"])
def test_allocate(how, tiny_llama, texts, tmp_path):  # noqa: F811
    words = ["allocate", str(tiny_llama), "--bits", "3.6", "--general", str(texts / "general.txt"), "--tasks"]
    words += [
        str(texts / "sums.jsonl"),
        "--samples",
        "2",
        "--items",
        "4",
        "--calibration-samples",
        "2",
        "--window",
        "32",
    ]
    words += ["--widths", "2,4", "--group-size", "32", "--refine", "2", "--sensitivity", how, "--method", "awq"]
    found = []
    for memory in (None, SMALL):
        more = ["--cache", str(tmp_path / f"cache{memory}"), "--out", str(tmp_path / f"{memory}.json")]
        more += [] if memory is None else ["--memory", str(memory)]
        found.append(numbers(tmp_path, *words, *more))
    close(*found)
    assert json.loads((tmp_path / "None.json").read_text()) == json.loads((tmp_path / f"{SMALL}.json").read_text())


def test_mix_and_columns(tiny_llama, texts, tmp_path, capsys):  # noqa: F811
    general, sums = str(texts / "general.txt"), str(texts / "sums.jsonl")
    words = ["mix", str(tiny_llama), "--general", general, "--tasks", sums, "--window", "24", "--samples", "4"]
    words += ["--verify", "--seeds", "1", "--step", "0.5"]
    close(numbers(tmp_path, *words), numbers(tmp_path, *words, "--memory", str(SMALL)))
    words = [
        "columns",
        str(tiny_llama),
        "--bits",
        "3.5",
        "--block",
        "32",
        "--group-size",
        "32",
        "--calibration",
        general,
    ]
    words += ["--samples", "2", "--window", "24"]
    plans = []
    for memory in ([], ["--memory", str(SMALL)]):
        main([*words, "--out", str(tmp_path / "columns.json"), *memory])
        plans.append(json.loads((tmp_path / "columns.json").read_text()))
    assert plans[0] == plans[1]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*words, "--out", str(tmp_path / "c.json"), "--memory", str(SMALL), "--sort", str(tmp_path / "sorted")])
    assert "--sort needs all of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["allocate", str(tiny_llama), "--bits", "4", "--memory", str(SMALL), "--out", str(tmp_path / "p.json")])
    assert "is to write its own calibration text" in capsys.readouterr().err
