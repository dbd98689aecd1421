"""Adapters on disk: read back exactly, refused when damaged, and the same numbers in peft where it is installed."""

import json

import pytest
import torch

from polybit.core.runtime import PolybitError
from polybit.hub.peft import load_peft, save_peft
from polybit.nn.adapters import Lora
from tests.families import prompt, tiny_model

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
