"""The ends keep their own width: rounded, held by the presets, through a file and back."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from polybit.cli import main
from polybit.compress.ends import LARGE, end_bits, end_targets, hold_ends, quantize_ends
from polybit.core.runtime import PolybitError
from polybit.hub.checkpoint import save
from polybit.hub.load import load_float, load_quantized
from polybit.nn import switch
from tests.families import quantized, tiny_model


def held(family):
    model = quantized(family)
    names = quantize_ends(model, 8, 32)
    hold_ends(model, names, 8, (8, 3))
    return model, names


@pytest.mark.parametrize(("family", "count"), [("llama", 2), ("llama-tied", 1), ("gpt2", 1)])
@pytest.mark.parametrize("wanted", ["w3", 3, "w3a8"])
def test_every_way_to_ask_for_a_width_keeps_the_ends(family, count, wanted, tmp_path):
    model, names = held(family)
    assert len(names) == count
    save(model, tmp_path / "out", widths=(8, 3))
    for one in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        switch.use(one, wanted)
        layers = switch.panel(one).layers
        assert {layers[name].width for name in names} == {8}
        assert {layer.width for name, layer in layers.items() if name not in names} == {3}
        assert {layer.precision.a for layer in layers.values()} == {8 if wanted == "w3a8" else 16}
        switch.use(one, "w2")  # a width that is no preset is read as it stands
        assert {layer.width for layer in layers.values()} == {2}


def test_rounded_ends_hardly_change_the_model():
    model = tiny_model("llama")
    ids = torch.arange(5, 25)[None]
    with torch.inference_mode():
        before = model(ids).logits
        quantize_ends(model, 8, 32)
        after = model(ids).logits
    assert 0 < (after - before).abs().max() < 0.02 * before.abs().max()


def test_small_heads_stay_in_float_unless_asked():
    model = tiny_model("llama")
    assert end_bits(model, None) == 16 and end_bits(model, 6) == 6
    assert max(t.size for t in end_targets(model)) < LARGE
    with pytest.raises(PolybitError, match="--ends 9"):
        end_bits(model, 9)
    assert quantize_ends(model, 16, 32) == [] and end_targets(model)[0].size != 0


def test_a_file_with_ends_of_their_own_is_measured_once_at_each_width(tiny_llama, tmp_path):
    """Its plain widths are plans too, and stand among both."""
    out, record = str(tmp_path / "out"), tmp_path / "eval.json"
    main(["quantize", str(tiny_llama), "--out", out, "--method", "rtn", "--bits", "3", "--ends", "8", "--no-measure"])
    flags = ["--windows", "2", "--window", "32", "--answers", "0", "--json", str(record)]
    main(["eval", out, "--reference", str(tiny_llama), "--precision", "w3,w3", *flags])
    main(["eval", out, "--reference", str(tiny_llama), *flags])
    numbers = json.loads(record.read_text())["numbers"]
    assert list(numbers["presets"]) == ["w3"] and numbers["presets"]["w3"]["kl"]["n"] == 2


@pytest.mark.parametrize(("how", "names"), [("rtn", ["plan"]), ("nested", ["w8", "w3", "plan"])])
def test_a_file_made_by_a_plan_keeps_its_ends_too(how, names, tiny_llama, tmp_path):
    """Of a fixed file no layer is read at the widest one's width, and the plan is all there is to read it by."""
    layers = {"model.layers.0.self_attn.q_proj": "w8", "model.layers.1.mlp.down_proj": "w4"}
    (tmp_path / "plan.json").write_text(json.dumps({"default": "w3", "layers": layers}))
    flags = ["--plan", str(tmp_path / "plan.json"), "--group-size", "32", "--ends", "8", "--no-measure"]
    more = ["--method", how, *(["--widths", "8,3", "--samples", "2", "--window", "16"] if how == "nested" else [])]
    main(["quantize", str(tiny_llama), "--out", str(tmp_path / "out"), *flags, *more])
    model, _ = load_quantized(tmp_path / "out")
    assert sorted(switch.presets(model)) == sorted(names)
    ends = {target.name for target in end_targets(load_float(str(tiny_llama))[0])}
    switch.use(model, "plan")
    found = {name: layer.width for name, layer in switch.panel(model).layers.items()}
    assert {found[name] for name in ends} == {8}
    assert {name: f"w{width}" for name, width in found.items() if name not in ends and width != 3} == layers


def test_a_width_it_was_not_made_for_is_warned_of(tiny_llama, tmp_path, capsys):
    out = str(tmp_path / "out")
    main(["quantize", str(tiny_llama), "--out", out, "--method", "rtn", "--bits", "4", "--ends", "8", "--no-measure"])
    capsys.readouterr()
    for precision, warned in ("w4", False), ("float", False), ("w4a8", False), ("w3", True), ("w2a8", True):
        main(["generate", out, "--prompt", "the cat", "--raw", "--max-tokens", "2", "--precision", precision])
        assert (f"made for w4; at {precision[:2]} its codes are cut off" in capsys.readouterr().err) == warned
