"""`polybit train` and `polybit frontier` end to end on a tiny model: one file, its presets, one-sentence errors."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from polybit.cli import main
from polybit.hub.load import load
from polybit.nn import switch
from polybit.nn.board import board_of

TINY = ["--steps", "4", "--rows", "24", "--batch", "4", "--length", "96", "--group-size", "16"]


def train(model, out, *more):
    main(["train", str(model), "--out", str(out), *TINY, "--json", str(out) + ".json", *more])
    return json.loads((out.parent / f"{out.name}.json").read_text())


@pytest.fixture(scope="module")
def trained(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "out"
    return out, train(tiny_llama, out, "--slack", "5", "--learning-rate", "1e-3")


def test_one_checkpoint_holds_the_presets(trained):
    out, run = trained
    model, tokenizer = load(out)
    assert tokenizer is not None and set(switch.presets(model)) == {"A", "B", "C"}
    assert {layer.bits for layer in switch.panel(model).layers.values()} == {8}
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        said = {name: switch.use(model, name)(ids).logits for name in "ABC"}
    assert not torch.equal(said["A"], said["C"])
    presets = run["numbers"]["presets"]
    assert set(presets) == {"A", "B", "C"} and presets["C"]["start"]["kl"] > presets["A"]["start"]["kl"] >= 0
    assert not out.with_name("out.partial").exists()


def test_it_goes_on_from_a_quantized_checkpoint(trained, tmp_path):
    source, first = trained
    again = train(source, tmp_path / "again", "--presets", "w8,w4", "--schedule", "random", "--method", "sp")
    assert set(again["numbers"]["presets"]) == {"w8", "w4"}
    assert again["numbers"]["float"]["nll"] == pytest.approx(first["numbers"]["float"]["nll"], rel=0.5)


def test_norms_are_trained_and_stored_on_request(tiny_llama, tmp_path):
    float_model, _ = load(tiny_llama)
    wanted = float_model.model.norm.weight.detach()
    for flags in (["--norms"], []):
        out = tmp_path / f"out{len(flags)}"
        train(tiny_llama, out, "--presets", "A=w8,B=w4a4", "--labels", "0", "--probes", "0", *flags)
        assert torch.equal(load(out)[0].model.norm.weight, wanted) == (not flags)


@pytest.mark.parametrize("method", ["independent", "nested"])
def test_codes_of_their_own_give_a_checkpoint_each(tiny_llama, tmp_path, method):
    flags = ["--adapter", "nested"] if method == "nested" else ["--method", "independent"]
    run = train(tiny_llama, tmp_path / "out", "--presets", "A=w8,B=w3", *flags)
    assert len(run["numbers"]["saved"]) == 2
    for name, bits in (("A", 8), ("B", 3)):
        model, _ = load(tmp_path / "out" / name)
        assert {layer.bits for layer in switch.panel(model).layers.values()} == {bits}


def test_adapters_are_saved_for_peft(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--presets", "A=w8,B=w4", "--adapter", "lora", "--rank", "2", "--slack", "5"]
    run = train(tiny_llama, Path("out"), *flags)
    assert run["numbers"]["saved"] == ["out", "out/adapters/A", "out/adapters/B"], "paths as they were given"
    config = json.loads((tmp_path / "out" / "adapters" / "B" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 2
    assert (tmp_path / "out" / "adapters" / "B" / "adapter_model.safetensors").is_file()
    model, _ = load(tmp_path / "out")
    assert board_of(model).adapted and sorted(next(iter(board_of(model).adapted.values())).adapters) == ["A", "B"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--presets", "A=w9"], "9 bits"),
        (["--presets", "A=w8,A=w4"], "twice"),
        (["--presets", ""], "is empty"),
        (["--schedule", "cyclic", "--steps", "4", "--cycles", "9"], "longer than the run"),
        (["--switchability", "1"], "give --adapter lora"),
        (["--length", "4096"], "longer than the model's context"),
        (["--data", "nowhere.txt"], "does not exist"),
        (["--steps", "0"], "--steps 0"),
        (["--method", "joint", "--labels", "0"], "learns from the data alone"),
        (["--presets", "A=nowhere.json"], "no such file"),
    ],
)
def test_mistakes_are_one_sentence(tiny_llama, tmp_path, capsys, flags, sentence):
    with pytest.raises(SystemExit):
        main(["train", str(tiny_llama), "--out", str(tmp_path / "out"), "--group-size", "16", *flags])
    said = capsys.readouterr().err.strip().splitlines()
    assert sentence in said[-1] and said[-1].startswith("polybit: ")
    assert not (tmp_path / "out").exists()


def test_frontier_draws_and_writes_plans(trained, tmp_path, capsys):
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    out = tmp_path / "front"
    flags = ["--windows", "1", "--window", "24", "--points", "3", "--evaluations", "4", "--presets", "w8a8,w4a4,w3a4"]
    main(["frontier", str(trained[0]), "--out", str(out), "--cost", "bitops", *flags])
    points = json.loads((out / "points.json").read_text())["numbers"]["points"]
    best = sorted((p for p in points if p["best"]), key=lambda p: p["cost"])
    assert best and all(a["harm"] > b["harm"] for a, b in pairwise(best))
    assert {p["found_by"] for p in points} >= {"uniform", "evolved"}
    assert "<svg" in (out / "frontier.svg").read_text() and (out / "frontier.md").read_text().startswith("| bit op")
    from polybit.compress.plan_files import read_plan

    model, _ = load(trained[0])
    switch.use(model, read_plan(out / "plan-00.json"))
    with pytest.raises(SystemExit):
        main(["frontier", str(trained[0]), "--out", str(out), "--presets", "w8"])
    assert "leaves nothing to choose" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tiny_llama, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", str(tiny_llama), "--out", str(tmp_path / "out"), *TINY, "--device", "cuda"])
    assert "torch sees no GPU" in capsys.readouterr().err and not (tmp_path / "out").exists()
