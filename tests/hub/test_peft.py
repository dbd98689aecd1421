"""Adapters on disk: read back exactly, refused when damaged, and the same numbers in peft where it is installed."""

import json
import shutil

import pytest
import torch

from polybit.compress.sizes import preset_sizes
from polybit.core.plan import Plan
from polybit.core.runtime import PolybitError
from polybit.hub.checkpoint import save
from polybit.hub.directory import MANIFEST
from polybit.hub.load import load
from polybit.hub.peft import load_peft, save_peft
from polybit.nn.adapters import Lora, plug, plugged
from polybit.nn.switch import set_presets, use
from tests.families import prompt, quantized, tiny_model

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def adapters(model, rank=3, alpha=6.0):
    torch.manual_seed(3)
    found = {}
    for name in NAMES:
        layer = model.get_submodule(name)
        lora = Lora(layer.out_features, layer.in_features, rank, layer.weight.detach(), alpha=alpha)
        lora.up_OR.data.normal_(std=0.2)
        for factor in lora.parameters():
            factor.data.copy_(factor.data.half())
        found[name] = lora
    return found


def test_read_back_exactly(tmp_path):
    made = adapters(tiny_model("llama"))
    found = load_peft(save_peft(made, tmp_path / "A", base_model="tiny"))
    assert set(found) == set(NAMES)
    for name, lora in found.items():
        assert lora.alpha == 6.0 and not lora.down_RI.requires_grad
        assert torch.equal(lora.down_RI, made[name].down_RI) and torch.equal(lora.up_OR, made[name].up_OR)
    assert made[NAMES[0]].nbytes() == 2 * 3 * (72 + 72)


def test_peft_gives_the_same_logits(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    made = adapters(model)
    save_peft(made, tmp_path / "A", base_model="tiny")
    with torch.no_grad():
        plain = model(prompt()).logits
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, x, y, lora=lora: y + lora(x[0]))
        for name, lora in made.items()
    ]
    with torch.no_grad():
        ours = model(prompt()).logits
    for hook in hooks:
        hook.remove()
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "A").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(prompt()).logits, ours, atol=1e-4)
    assert not torch.allclose(plain, ours, atol=1e-2)


def test_damaged_adapters_are_refused(tmp_path):
    made = adapters(tiny_model("llama"))
    with pytest.raises(PolybitError, match="no adapter to save"):
        save_peft({}, tmp_path / "none", base_model="tiny")
    path = save_peft(made, tmp_path / "A", base_model="tiny")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(PolybitError, match="no plain LoRA"):
        load_peft(path)
    (path / "adapter_config.json").write_text(json.dumps(config))
    (path / "adapter_model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(PolybitError, match="cannot be read"):
        load_peft(path)
    with pytest.raises(PolybitError, match="missing"):
        load_peft(tmp_path / "nowhere")


def logits(model, preset):
    with torch.no_grad():
        return use(model, preset)(prompt()).logits


@pytest.fixture(scope="module")
def worn(tmp_path_factory):
    """(a model whose preset B has an adapter, the checkpoint it was saved to)."""
    model = quantized("llama").eval()
    set_presets(model, {"A": Plan.uniform("w8"), "B": Plan.uniform("w4")})
    plug(model, {name: {"B": lora} for name, lora in adapters(tiny_model("llama")).items()})
    return model, save(model, tmp_path_factory.mktemp("worn") / "model", widths=(8, 4))


def test_a_checkpoint_keeps_the_adapters_of_its_presets(worn, tmp_path):
    model, out = worn
    files = json.loads((out / MANIFEST).read_text())["files"]
    assert {"adapters/B/adapter_config.json", "adapters/B/adapter_model.safetensors"} <= set(files)
    again, _ = load(str(out))
    for preset in ("A", "B"):  # read back it multiplies by the compiled kernels
        assert torch.allclose(logits(again, preset), logits(model, preset), atol=1e-3), preset
    assert not torch.allclose(logits(again, "B"), logits(again, "w4"), atol=1e-2), "a plain width wears nothing"
    size, plain = preset_sizes(again, ["B", "w4"]).values()
    assert size["bytes"] - plain["bytes"] == sum(lora.nbytes() for lora in plugged(again)["B"].values()) > 0
    assert size["bits_per_weight"] > plain["bits_per_weight"]
    again.save_pretrained(tmp_path / "copy")
    assert torch.equal(logits(load(str(tmp_path / "copy"))[0], "B"), logits(again, "B"))


def test_adapters_of_a_checkpoint_are_checked_and_others_refused(worn, tmp_path):
    out, strange, damaged = worn[1], tmp_path / "strange", tmp_path / "damaged"
    shutil.copytree(out, strange)
    shutil.copytree(out / "adapters" / "B", strange / "adapters" / "A")  # nobody listed it
    with pytest.raises(PolybitError, match=r"A/adapter_model\.safetensors is not part of the checkpoint"):
        load(str(strange))
    shutil.copytree(out, damaged)
    with (damaged / "adapters" / "B" / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(PolybitError, match="differs from its sha256"):
        load(str(damaged))
    shutil.rmtree(damaged / "adapters")
    with pytest.raises(PolybitError, match="is missing"):
        load(str(damaged))


@pytest.mark.parametrize(
    "name", ["adapters/../adapter_config.json", "adapters/B/C/adapter_config.json", "adapters/B/x"]
)
def test_a_manifest_names_no_other_file(worn, name, tmp_path):
    shutil.copytree(worn[1], tmp_path / "model")
    manifest = tmp_path / "model" / MANIFEST
    listed = json.loads(manifest.read_text())
    listed["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    manifest.write_text(json.dumps(listed))
    with pytest.raises(PolybitError, match="malformed entry"):
        load(str(tmp_path / "model"))
