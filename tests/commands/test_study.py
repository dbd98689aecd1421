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
    with pytest.raises(SystemExit):
        main(["study", str(tiny_llama), *flags, "--length", "97"])
    assert "whose length was 96 and not 97" in capsys.readouterr().err
    main(["study", str(tiny_llama), *flags])
    assert seals == {path.name: path.stat().st_mtime_ns for path in (out / "predictions").glob("*-*.json")}
    assert "6. What is open?" in capsys.readouterr().out


@pytest.mark.slow
def test_conversation_and_bits_on_the_embedded_model(tmp_path, capsys):
    """About a minute: everything is measured, kept, and said."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("scipy")
    exam = ["--test-prompts", "16", "--max-tokens", "16", "--choice-items", "12", "--samples", "4", "--text-windows",
            "4"]  # fmt: skip
    talk, bits = tmp_path / "talk", tmp_path / "bits"
    ask = ["study", "tinychat", "--question", "conversation", "--out", str(talk), *exam, "--train-prompts", "48",
           "--bits", "2", "--aligned-bits", "2", "--quantizers", "rtn,gptq", "--starts", "rtn",
           "--objectives", "kd,qdpo", "--steps", "10", "--batch", "4"]  # fmt: skip
    main(ask)
    facts = json.loads((talk / "study.json").read_text())
    assert {"float", "rtn w2", "gptq w2", "rtn w2 kd", "rtn w2 qdpo"} == set(facts["rows"])
    assert facts["rows"]["float"]["flips"]["value"] == 0 and facts["rows"]["float"]["same"]["value"] == 1
    assert facts["rows"]["rtn w2"]["flips"]["value"] > facts["rows"]["gptq w2"]["flips"]["value"] > 0
    assert facts["against"]["rtn w2 kd"]["kl_left"]["value"] < 1 >= facts["against"]["rtn w2 qdpo"]["kl_left"]["value"]
    page = (talk / "study.html").read_text()
    assert "Does conversation suffer before accuracy?" in page and "<svg" in page
    trained, asked = ((talk / f"{name}.jsonl").read_text().splitlines() for name in ("train", "test"))
    assert len(trained) == 48 and len(asked) == 16 and not set(trained) & set(asked)
    times = {path: path.stat().st_mtime_ns for path in talk.rglob("*") if path.is_file() and path.parent != talk}
    main(ask)
    assert times == {path: path.stat().st_mtime_ns for path in times}, "a finished part is not done again"

    main(["study", "tinychat", "--question", "bits", "--out", str(bits), *exam, "--train-prompts", "2", "--uniform",
          "rtn", "--budget", "3.4", "--task-items", "4", "--planned-by", "rtn,gptq",
          "--mix", "embedded=1", "--mix-samples", "5"])  # fmt: skip
    facts = json.loads((bits / "study.json").read_text())
    assert set(facts["rows"]) == {"float", "plan 3.4 rtn", "plan 3.4 gptq", "rtn w4"}
    assert set(facts["against"]) == {"plan 3.4 rtn against rtn w4", "plan 3.4 gptq against rtn w4"}
    assert facts["rows"]["plan 3.4 gptq"]["bits"] <= 3.4
    assert "Precision inversion: " in (bits / "study.html").read_text()
    capsys.readouterr()


@pytest.mark.parametrize("named", [{}, {"ranked_by": "rtn"}])
def test_needs_are_read_with_the_quantizer_that_is_named(tmp_path, monkeypatch, named):
    from polybit.acts import study_bits
    from polybit.core.records import Run

    asked = []
    monkeypatch.setattr(study_bits, "allocate", lambda _, how: asked.append(how.method) or Run("allocate", {}))
    study_bits.planned("tinychat", StudyOptions(question="bits", out=tmp_path, **named))
    assert asked == [named.get("ranked_by", "gptq")]


def test_differences_are_paired():
    from polybit.acts.study_paired import compared

    def model(flips, right):
        same = [flip == 0 for flip in flips]
        return {"bits": 4.0, "flips": flips, "tokens": [10.0] * 4, "kl": [flip / 10 for flip in flips],
                "margin": [5.0] * 4, "answers": [[1, 2, 3 + (flip > 0)] for flip in flips], "same": same,
                "shared": [3 - (flip > 0) for flip in flips], "nll": [2.0, 2.5], "tasks": {"q": right}}  # fmt: skip

    all_right = [True] * 4
    found = compared(
        {"float": model([0, 0, 0, 0], all_right), "a": model([4, 4, 4, 4], [True, True, False, False]),
         "b": model([2, 2, 2, 2], all_right)}, {"b against a": ("b", "a")},
    )  # fmt: skip
    assert found["rows"]["a"]["flips"] == {"value": 0.4, "low": 0.4, "high": 0.4, "n": 4}
    assert found["rows"]["a"]["task_mean"]["changed"]["value"] == 0.5
    assert found["rows"]["a"]["task_mean"]["difference"]["value"] == -0.5
    left = found["against"]["b against a"]
    assert left["flips_left"]["value"] == left["flips_left"]["high"] == 0.5 and left["task_mean"]["value"] == 0.5
    assert left["fidelity"]["tie"]["value"] == 1, "both differ from the float answers in the same token"


def test_a_ratio_to_nothing_is_a_number():
    from polybit.acts.study_paired import ratio

    assert ratio([0, 0], [0, 0]) == {"value": 1, "low": 1, "high": 1, "n": 2}
    assert ratio([1, 2], [0, 0])["value"] == 1000
    found = ratio([1, 0, 0], [1, 0, 0])  # many draws have neither
    assert found["value"] == found["low"] == found["high"] == 1
    assert ratio([1, 1, 1], [1, 0, 0])["high"] == 1000


def row(label, lost, changed=0.1, same=0.2):
    return label, {
        "bits": 4.0, "flips": estimate(0.1), "kl": estimate(0.1), "same": estimate(same), "margin": estimate(0.5),
        "margin_difference": estimate(-0.02, -0.03, -0.01), "perplexity": estimate(9.0),
        "task_mean": estimate(0.5) | {"difference": estimate(*lost), "changed": estimate(changed)},
    }  # fmt: skip


def test_the_verdict_on_conversation_follows_the_intervals():
    from polybit.report.study import text_summary

    gone = {name: estimate(0.4, 0.3, 0.5) for name in ("flips_left", "kl_left", "nll", "margin", "task_mean")}
    gone["fidelity"] = {"win_minus_lose": estimate(0.3)}
    arms = {label: {"method": "rtn", "width": width, "start": "", "objective": "", "seed": 0}
            for label, width in (("rtn w4", 4), ("rtn w3", 3))}  # fmt: skip
    arms["rtn w3 kd"] = arms["rtn w3"] | {"start": "rtn w3", "objective": "kd"}
    rows = dict([row("float", (0, 0, 0)), row("rtn w4", (0, -0.01, 0.01)), row("rtn w3", (-0.1, -0.2, -0.05)),
                 row("rtn w3 kd", (0, -0.1, 0.1))])  # fmt: skip
    facts = {"question": "conversation", "model": "m", "config": {"steps": 1, "batch": 1}, "asked": {"prompts": 4},
             "arms": arms, "rows": rows, "against": {"rtn w3 kd": gone}}  # fmt: skip
    pytest.importorskip("matplotlib")
    said = text_summary(facts)
    assert "Yes at first" in said and "rtn w3 kd: 60.0 [50.0, 70.0] % fewer flips" in said
    assert "surely narrower than the float model's at rtn w4, rtn w3." in said
    rows |= dict([row("rtn w4", (-0.1, -0.2, -0.05))])
    assert "No: wherever answers change" in text_summary(facts)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--question", "conversation", "--starts", "awq", "--quantizers", "rtn"], "'awq'"),
        (["--aligned-bits", "2"], "is not among --bits"),
        (["--uniform", "magic"], "'magic'"),
        (["--planned-by", "nested"], "'nested'"),
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


@pytest.mark.parametrize("path", sorted([*RECIPES.glob("switchable_*.toml"), *RECIPES.glob("studies/*.toml")]))
def test_recipes_name_flags_that_exist(path):
    flags = {key.replace("-", "_"): value for key, value in tomllib.loads(path.read_text())["study"].items()}
    assert flags.keys() <= {field.name for field in fields(StudyOptions)}
    assert StudyOptions(**{name: value for name, value in flags.items() if name not in ("squad", "data")}).out
    assert set(flags.get("arms", "cdt").split(",")) <= set(ARMS)


def estimate(value, low=None, high=None):
    return {"value": value, "low": value if low is None else low, "high": value if high is None else high, "n": 4}


def test_sentences_follow_the_intervals():
    from polybit.report.study import page, text_summary
    from polybit.report.study_switchable import beats

    def row(low, high):
        return {"em": estimate(0.5), "f1": estimate(0.5), "f1 over cdt": estimate((low + high) / 2, low, high)}

    plain = {"em": estimate(0.5), "f1": estimate(0.5)}
    points = [
        {"cost": 2.0, "harm": 0.1, "predicted": 0.05, "found_by": "evolved", "best": True, "name": "", "bits": 4},
        {"cost": 4.0, "harm": 0.2, "predicted": 0.2, "found_by": "uniform", "best": False, "name": "w4a8", "bits": 4},
        {"cost": 4.0, "harm": 0.4, "predicted": 0.2, "found_by": "uniform", "best": False, "name": "w8a4", "bits": 8},
    ]
    facts = {
        "question": "switchable",
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
