"""`polybit study` on a tiny model: six answers on one page, finished parts are not done again, recipes can be read."""

import json
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

from polybit.acts.table import ARMS
from polybit.cli import main
from polybit.options.study import StudyOptions

RECIPES = Path(__file__).parent.parent.parent / "recipes"


@pytest.mark.slow
def test_six_answers_on_one_page(tiny_llama, tmp_path, capsys):
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    out = tmp_path / "study"
    flags = ["--out", str(out), "--presets", "A=w8a8,B=w3a4", "--arms", "cdt,cyclic,independent", "--steps", "2",
             "--cycles", "1", "--rows", "20", "--length", "96", "--group-size", "16", "--items", "3", "--attack-items",
             "0", "--evaluations", "2", "--batch", "2"]  # fmt: skip
    main(["study", str(tiny_llama), *flags])
    facts = json.loads((out / "study.json").read_text())
    rows = facts["scores"]["rows"]
    assert {"float", "quantized A", "cdt B", "cyclic A", "independent B"} <= set(rows)
    assert rows["cyclic A"]["f1"]["n"] == 3 and "f1 over cdt" in rows["cyclic A"]
    page = (out / "study.html").read_text()
    assert page.count("<h2>") == 6 and "<svg" in page
    seals = {path.name: path.stat().st_mtime_ns for path in (out / "predictions").glob("*-*.json")}
    capsys.readouterr()
    main(["study", str(tiny_llama), *flags])
    assert seals == {path.name: path.stat().st_mtime_ns for path in (out / "predictions").glob("*-*.json")}
    assert "6. What is open?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--arms", "joint"], "lacks cdt"),
        (["--arms", "cdt,magic"], "'magic'"),
        (["--presets", "A=w8"], "needs two or more"),
        (["--seeds", "x"], "cannot be read"),
        (["--items", "0"], "--items"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, capsys, flags, sentence):
    with pytest.raises(SystemExit):
        main(["study", "tinychat", "--out", str(tmp_path / "out"), *flags])
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name", ["switchable_tiny.toml", "switchable_gpt2_squad.toml"])
def test_recipes_name_flags_that_exist(name):
    flags = tomllib.loads((RECIPES / name).read_text())["study"]
    assert {key.replace("-", "_") for key in flags} <= {field.name for field in fields(StudyOptions)}
    assert set(flags["arms"].split(",")) <= set(ARMS)


def estimate(value, low=None, high=None):
    return {"value": value, "low": value if low is None else low, "high": value if high is None else high, "n": 4}


def test_sentences_follow_the_intervals():
    from polybit.report.study import beats, page, text_summary

    def row(low, high):
        return {"em": estimate(0.5), "f1": estimate(0.5), "f1 over cdt": estimate((low + high) / 2, low, high)}

    plain = {"em": estimate(0.5), "f1": estimate(0.5)}
    points = [
        {"cost": 2.0, "harm": 0.1, "predicted": 0.05, "found_by": "evolved", "best": True, "name": "", "bits": 4},
        {"cost": 4.0, "harm": 0.2, "predicted": 0.2, "found_by": "uniform", "best": False, "name": "w4a8", "bits": 4},
        {"cost": 4.0, "harm": 0.4, "predicted": 0.2, "found_by": "uniform", "best": False, "name": "w8a4", "bits": 8},
    ]
    facts = {
        "model": "m<x>", "presets": {"A": "w8a8", "B": "w4a4"}, "attack": {}, "frontier": {"points": points},
        "scores": {"questions": 4, "seeds": 1, "rows": {
            "float": plain, "quantized A": plain, "quantized B": plain, "cdt A": plain, "cdt B": plain,
            "cyclic A": row(0.1, 0.2), "cyclic B": row(-0.2, -0.1), "joint A": row(-0.1, 0.1), "joint B": row(0, 0),
        }},
        "seconds": {f"{arm}-0": 10.0 for arm in ("cdt", "cyclic", "joint")},
        "loss": {f"{arm}-0": {n: {"start": {"nll": 0.75}, "end": {"nll": 0.5}} for n in "AB"}
                 for arm in ("cdt", "cyclic", "joint")},
    }  # fmt: skip
    assert beats(facts, "cyclic", "cdt") == "cyclic against cdt: better at A and worse at B."
    assert "no difference" in beats(facts, "joint", "cdt")
    said = text_summary(facts)
    assert "50% below uniform w4a8" in said and "activations are the more sensitive" in said
    assert "wrong by up to 2.0 times" in said and "rank joint against cdt" in said
    assert "of their time" not in said
    half = {"em": estimate(0.4), "f1": estimate(0.4)}
    facts["scores"]["rows"] |= {"independent A": plain, "independent B": half, "joint A": half}
    facts["seconds"]["independent-0"] = 40.0
    facts["loss"]["independent-0"] = facts["loss"]["cdt-0"]
    said = text_summary(facts)
    assert "cdt 100.0% in 0.25 times" in said and "joint 80.0% in 0.25 times" in said
    pytest.importorskip("matplotlib")
    assert "<td>0.7500</td>" in page(facts) and "cdt: every more precise preset teaches" in page(facts)
    assert "m&lt;x&gt;" in page(facts) and "m<x>" not in page(facts)
