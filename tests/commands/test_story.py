"""Story: every verb, end to end, on a tiny random model; an interrupted run goes on to the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from polybit.cli import main
from polybit.hub.directory import check_manifest
from polybit.hub.workspace import Workspace

FAST = ["--samples", "8", "--window", "32", "--calibration", "embedded", "--no-measure"]


def manifest(directory):
    return json.loads((directory / "manifest.json").read_text())["files"]


@pytest.fixture(scope="module")
def nested_checkpoint(tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("story") / "nested"
    numbers = out.with_suffix(".json")
    main(["quantize", str(tiny_llama), "--out", str(out), "--widths", "8,4,3,2", "--effort", "fast",
          "--samples", "8", "--window", "32", "--calibration", "embedded", "--json", str(numbers)])  # fmt: skip
    return out, json.loads(numbers.read_text())


def test_quantize_measures_and_describes(nested_checkpoint):
    out, run = nested_checkpoint
    numbers = run["numbers"]
    assert numbers["widths"] == [8, 4, 3, 2]
    kl = [numbers["measured"]["presets"][f"w{b}"]["kl"]["value"] for b in (8, 4, 3, 2)]
    assert kl == sorted(kl) and kl[0] < 0.01 and kl[-1] > 10 * kl[0] > 0
    sizes = [numbers["sizes"][f"w{b}"]["bytes"] for b in (8, 4, 3, 2)]
    assert sizes == sorted(sizes, reverse=True)
    card = (out / "README.md").read_text()
    assert "base_model_relation: quantized" in card and "| w3 |" in card
    assert run["verb"] == "quantize" and run["seconds"] > 0
    assert not out.with_name("nested.partial").exists()


def test_plain_transformers_loads_it(nested_checkpoint):
    from transformers import AutoModelForCausalLM

    import polybit

    model = AutoModelForCausalLM.from_pretrained(nested_checkpoint[0])
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        wide = polybit.use(model, "w8")(ids).logits
        narrow = polybit.use(model, "w2")(ids).logits
        again = polybit.use(model, "w8")(ids).logits
    assert torch.equal(wide, again) and not torch.allclose(wide, narrow)
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] <= 14


def test_eval_report_generate(nested_checkpoint, tiny_llama, tmp_path, capsys):
    out, _ = nested_checkpoint
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"The ship number {i} left the harbour with {i * 7} boxes of plums." for i in range(200)))
    numbers = tmp_path / "eval.json"
    main(["eval", str(out), "--reference", str(tiny_llama), "--text", str(text), "--windows", "4", "--window", "32",
          "--answers", "3", "--max-tokens", "6", "--tasks", "arithmetic", "--items", "4",
          "--json", str(numbers)])  # fmt: skip
    run = json.loads(numbers.read_text())
    assert set(run["numbers"]["presets"]) == {"w8", "w4", "w3", "w2"}
    assert run["numbers"]["presets"]["w8"]["kl"]["value"] < run["numbers"]["presets"]["w2"]["kl"]["value"]
    page = tmp_path / "page.html"
    main(["report", str(out), "--eval", str(numbers), "--out", str(page)])
    html = page.read_text()
    assert html.count("<svg") >= 5 and "http://" not in html.replace("http://www.w3.org", "") and "<mark>" in html
    capsys.readouterr()
    answer = tmp_path / "answer.json"
    main(["generate", str(out), "--prompt", "Hello", "--precision", "w3", "--max-tokens", "5", "--json", str(answer)])
    printed = capsys.readouterr().out.strip()
    written = json.loads(answer.read_text())["numbers"]
    assert written["answer"] == printed.splitlines()[-1].strip() if printed else True
    assert written["new_tokens"] <= 5


def test_report_from_what_quantize_measured(nested_checkpoint, tmp_path):
    page = tmp_path / "page.html"
    main(["report", str(nested_checkpoint[0]), "--out", str(page)])
    assert "bits/weight" in page.read_text()


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "hqq"])
def test_every_fixed_method(method, tiny_llama, tmp_path):
    out = tmp_path / method
    main(["quantize", str(tiny_llama), "--out", str(out), "--bits", "4", "--method", method, *FAST])
    assert json.loads((out / "config.json").read_text())["quantization_config"]["widths"] == [4]


def test_an_existing_output_is_replaced_only_when_asked(nested_checkpoint, tiny_llama, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["quantize", str(tiny_llama), "--out", str(out), "--bits", "4", "--method", "rtn", *FAST]
    main(arguments)
    first = manifest(out)
    with pytest.raises(SystemExit):
        main(arguments)
    assert "exists" in capsys.readouterr().err and manifest(out) == first
    main([*arguments, "--overwrite"])
    assert manifest(out) == first, "the same command gives the same bytes"


def test_an_interrupted_run_goes_on_to_the_same_bytes(tiny_llama, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = ["quantize", str(tiny_llama), "--bits", "3", "--method", "gptq", *FAST]
    main([*arguments, "--out", str(whole)])
    written = []
    keep = Workspace.write

    def write_then_die(self, block, weights):
        keep(self, block, weights)
        written.append(block)
        raise KeyboardInterrupt

    for expected in (1, 2):
        monkeypatch.setattr(Workspace, "write", write_then_die)
        with pytest.raises(SystemExit) as caught:
            main([*arguments, "--out", str(parts)])
        assert caught.value.code == 130 and not parts.exists()
        assert len(written) == expected, "finished blocks are not computed again"
    assert "go on" in capsys.readouterr().err
    monkeypatch.setattr(Workspace, "write", keep)
    main([*arguments, "--out", str(parts)])
    mine, theirs = manifest(parts), manifest(whole)
    assert {k: v for k, v in mine.items() if k != "run.json"} == {k: v for k, v in theirs.items() if k != "run.json"}


def test_work_of_another_run_is_refused(tiny_llama, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"

    def die(self, block, weights):
        raise KeyboardInterrupt

    monkeypatch.setattr(Workspace, "write", die)
    with pytest.raises(SystemExit):
        main(["quantize", str(tiny_llama), "--out", str(out), "--bits", "3", "--method", "gptq", *FAST])
    with pytest.raises(SystemExit):
        main(["quantize", str(tiny_llama), "--out", str(out), "--bits", "4", "--method", "gptq", *FAST])
    assert "--restart" in capsys.readouterr().err
    monkeypatch.undo()
    main(["quantize", str(tiny_llama), "--out", str(out), "--bits", "4", "--method", "gptq", "--restart", *FAST])
    assert out.is_dir()


def test_a_weight_that_is_not_finite_is_named(broken_llama, tmp_path, capsys):
    name = "model.layers.1.mlp.up_proj.weight"

    def poison(tensors):
        tensors[name][3, 4] = float("nan")

    with pytest.raises(SystemExit):
        main(["quantize", str(broken_llama(poison)), "--out", str(tmp_path / "o"), "--bits", "4", *FAST])
    assert "model.layers.1.mlp.up_proj" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_check_or_a_measurement_that_fails_costs_no_work(tiny_llama, tmp_path, monkeypatch, capsys):
    """Memory that ends after the codes are made: the same command goes on from them, or the checkpoint is there."""
    out = tmp_path / "out"
    told = ["--out", str(out), "--bits", "4", "--method", "rtn", "--samples", "4", "--window", "32"]
    command = ["quantize", str(tiny_llama), *told, "--calibration", "embedded"]

    def failing(*_, **__):
        raise RuntimeError("can't allocate memory")

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr("polybit.hub.checkpoint.verify", failing)
        main(command)
    assert not out.exists() and list((tmp_path / "out.partial").glob("*.safetensors"))
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr("polybit.compress.loop.quantize_layer", failing)  # every block is finished
        patched.setattr("polybit.acts.quantize.compare", failing)
        main(command)
    said = capsys.readouterr().err
    assert "memory is used up" in said
    check_manifest(out)
    assert "sizes" in json.loads((out / "run.json").read_text())["numbers"] and (out / "README.md").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.slow
def test_killed_at_any_moment(tiny_llama, tmp_path):
    """kill -9 after random times: the output is absent or whole, and the last run ends in the same bytes."""
    arguments = [sys.executable, "-m", "polybit", "quantize", str(tiny_llama), "--bits", "3", "--method", "gptq", *FAST]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, out = tmp_path / "whole", tmp_path / "out"
    started = time.perf_counter()
    subprocess.run([*arguments, "--out", str(whole)], check=True, env=environment, capture_output=True)
    seconds = time.perf_counter() - started
    for attempt in range(8):
        run = subprocess.Popen([*arguments, "--out", str(out)], env=environment, stderr=subprocess.DEVNULL)
        time.sleep(seconds * (0.3 + 0.09 * attempt))
        run.send_signal(signal.SIGKILL)
        run.wait()
        if out.exists():
            break
    else:
        subprocess.run([*arguments, "--out", str(out)], check=True, env=environment, capture_output=True)
    assert manifest(out)["polybit.safetensors"] == manifest(whole)["polybit.safetensors"]
