"""A file made by a plan has no plain width: every verb that is told none takes it at its plan."""

import json
from pathlib import Path

import pytest

from polybit.cli import main


@pytest.fixture(scope="module")
def planned(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned")
    layers = {"model.layers.0.self_attn.q_proj": "w8", "model.layers.1.mlp.down_proj": "w4"}
    (folder / "plan.json").write_text(json.dumps({"default": "w3", "layers": layers}))
    flags = ["--plan", str(folder / "plan.json"), "--group-size", "32", "--ends", "8", "--no-measure"]
    main(["quantize", str(tiny_llama), "--out", str(folder / "q"), "--method", "rtn", *flags])
    return folder / "q"


VERBS = {
    "generate": ["--prompt", "the cat", "--raw", "--max-tokens", "2"],
    "cost": ["--context", "8", "--steps", "1", "--rounds", "1"],
    "bench switch": ["--rounds", "2"],
    "bench generate": ["--prompt", "4", "--tokens", "2", "--rounds", "1", "--no-peers"],
    "export": ["--to", "dense"],
    "eval": ["--windows", "2", "--window", "32", "--answers", "0"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_it_is_taken_at_its_plan(verb, planned, tiny_llama, tmp_path, capsys):
    more = {"export": ["--out", str(tmp_path / "out")], "eval": ["--reference", str(tiny_llama)]}.get(verb, [])
    record = [] if verb == "generate" else ["--json", str(tmp_path / "run.json")]
    main([*verb.split(), str(planned), *VERBS[verb], *more, *record])
    said = capsys.readouterr()
    assert "polybit:" not in said.err.replace("polybit: measuring", ""), said.err
    named = {"cost": '"plan"', "bench generate": "prompt plan", "eval": '"plan"'}.get(verb, "")
    assert not named or named in Path(record[1]).read_text()


def test_its_page_is_drawn(planned, tiny_llama, tmp_path):
    record, page = str(tmp_path / "eval.json"), tmp_path / "page.html"
    main(["eval", str(planned), "--reference", str(tiny_llama), *VERBS["eval"], "--json", record])
    main(["report", str(planned), "--eval", record, "--out", str(page)])
    assert ">plan</text>" in page.read_text()


def test_pairs_are_of_the_plan(planned, tiny_llama, tmp_path):
    (tmp_path / "p.txt").write_text("the cat saw\na red hat\nwho had left\n")
    flags = ["--prompts", str(tmp_path / "p.txt"), "--max-tokens", "4", "--reference", str(tiny_llama)]
    main(["pairs", str(planned), *flags, "--out", str(tmp_path / "pairs")])
    assert json.loads((tmp_path / "pairs" / "pairs.json").read_text())["precision"] == "plan"


def test_a_router_has_nothing_to_choose_from(planned, tiny_llama, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("the cat saw\na red hat\nwho had left\n")
    with pytest.raises(SystemExit):
        main(["route", str(planned), "--prompts", str(tmp_path / "p.txt"), "--budget", "3"])
    assert "two widths" in capsys.readouterr().err
