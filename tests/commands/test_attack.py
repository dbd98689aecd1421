"""`polybit attack` and `polybit eval --squad` as a user runs them, on a quantized embedded model."""

import json

import pytest

import polybit
from polybit.cli import main
from polybit.core.runtime import PolybitError
from polybit.data import synth
from polybit.data.squad import write_squad
from polybit.hub.checkpoint import save
from polybit.robust.table import ATTACKS
from tests.robust.models import chat


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    lm = chat()
    path = tmp_path_factory.mktemp("attack") / "chat"
    save(lm.model, path, tokenizer=lm.tokenizer, widths=(8, 4, 3))
    return str(path)


def refused(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_attack_gives_a_matrix_a_verdict_and_a_page(checkpoint, tmp_path, capsys):
    small = ["--items", "4", "--steps", "1", "--tries", "2", "--precision", "w8,w3", "--seeds", "0,1"]
    main(["attack", checkpoint, *small, "--json", str(tmp_path / "a.json"), "--report", str(tmp_path / "a.html")])
    shown = capsys.readouterr().out
    assert "all widths" in shown and "drawn per prompt" in shown
    numbers = json.loads((tmp_path / "a.json").read_text())["numbers"]
    assert numbers["items"] == 8 and set(numbers["matrix"]) == {"nobody", "random tokens", "w8", "w3", "all widths"}
    for row in numbers["matrix"].values():
        mean = (row["w8"]["value"] + row["w3"]["value"]) / 2
        assert row["drawn per prompt"]["value"] == pytest.approx(mean)
    page = (tmp_path / "a.html").read_text()
    assert numbers["verdict"] in page.replace("&#x27;", "'") and "http" not in page


def test_an_interrupted_attack_goes_on(checkpoint, tmp_path, monkeypatch, capsys):
    from polybit.robust import swaps

    out = tmp_path / "a.json"
    command = ["attack", checkpoint, "--items", "2", "--steps", "1", "--tries", "2", "--precision", "w8,w3", "--json"]
    calls, real = [], swaps.climb

    def failing(victim, *rest, **named):
        calls.append(victim.presets)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(victim, *rest, **named)

    monkeypatch.setattr(swaps, "climb", failing)
    with pytest.raises(SystemExit) as stop:
        main([*command, str(out)])
    assert stop.value.code == 130 and not out.exists()
    main([*command, str(out)])
    assert calls == [["w8"], ["w3"], ["w3"], ["w8", "w3"]]
    again = json.loads(out.read_text())["numbers"]
    assert not (tmp_path / "a.json.partial").exists()
    main([*command, str(tmp_path / "b.json")])
    assert json.loads((tmp_path / "b.json").read_text())["numbers"]["matrix"] == again["matrix"]


@pytest.mark.parametrize("method", [name for name in ATTACKS if name != "greedy"])
def test_every_method(checkpoint, method, capsys):
    few = ["--items", "2", "--steps", "1", "--tries", "2", "--precision", "w8,w3"]
    main(["attack", checkpoint, *few, "--method", method, "--place", "swap"])
    assert "per prompt" in capsys.readouterr().out


def test_attack_takes_a_squad_file(checkpoint, tmp_path, capsys):
    file = write_squad(tmp_path / "r.json", synth.items("reading", 5, 1))
    few = ["--items", "3", "--steps", "1", "--tries", "1", "--precision", "w8,w3"]
    main(["attack", checkpoint, "--squad", str(file.path), *few])
    assert "all widths" in capsys.readouterr().out


def test_attack_refusals(checkpoint, capsys, tmp_path):
    assert "float model" in refused(capsys, "attack", "tinychat", "--items", "1")
    assert '"greedy"' in refused(capsys, "attack", checkpoint, "--method", "magic")
    assert 'Choose from: "suffix", "swap"' in refused(capsys, "attack", checkpoint, "--place", "prefix")
    with pytest.raises(PolybitError, match="choose greedy"):
        polybit.attack(checkpoint, method="magic")
    with pytest.raises(PolybitError, match="choose suffix or swap"):
        polybit.attack(checkpoint, place="prefix")
    assert "--steps 0" in refused(capsys, "attack", checkpoint, "--steps", "0")
    assert "no such file" in refused(capsys, "attack", checkpoint, "--squad", "none.json")
    assert "cannot be read" in refused(capsys, "attack", checkpoint, "--seeds", "one")
    assert "is a directory" in refused(capsys, "attack", checkpoint, "--report", str(tmp_path))
    assert "not possible" in refused(capsys, "attack", checkpoint, "--precision", "w8,w9", "--items", "1")


def test_eval_answers_a_squad_file(checkpoint, tmp_path, capsys):
    few = ["--windows", "2", "--window", "32", "--answers", "0", "--squad-items", "6", "--precision", "w8,w3"]
    json_file = tmp_path / "e.json"
    main(["eval", checkpoint, "--reference", "tinychat", *few, "--squad", "embedded", "--json", str(json_file)])
    assert "EM, F1" in capsys.readouterr().out
    found = json.loads((tmp_path / "e.json").read_text())["numbers"]["squad"]
    assert set(found["scores"]) == {"float", "w8", "w3"} and found["questions"] == 6
    frozen = json.loads((tmp_path / "e-predictions" / "w8.json").read_text())
    assert len(frozen["predictions"]) == 6 and frozen["sha256"]
    assert "difference" in found["scores"]["w3"] and "difference" not in found["scores"]["float"]


def test_eval_squad_refusals(checkpoint, tmp_path, capsys):
    common = ["eval", checkpoint, "--reference", "tinychat", "--windows", "2", "--window", "32", "--answers", "0"]
    assert "no such file" in refused(capsys, *common, "--squad", "none.json")
    assert "choose generate or span" in refused(capsys, *common, "--squad", "embedded", "--squad-head", "tail")
    assert "needs --squad" in refused(capsys, *common, "--squad-head", "span")
    blind = tmp_path / "blind.json"
    blind.write_text('{"data": [{"paragraphs": [{"context": "A b.", "qas": [{"id": "1", "question": "Who?"}]}]}]}')
    assert "no answer" in refused(capsys, *common, "--squad", str(blind))
    assert "no span head" in refused(capsys, "eval", "tinychat", "--squad", "embedded", "--squad-head", "span")
