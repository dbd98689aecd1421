"""Reference: a converted model equals a float model that holds the dequantized weights, for every family and width."""

import pytest
import torch
from torch import nn

from polybit.core.planes import pack, unpack
from polybit.core.runtime import PolybitError
from polybit.nn.convert import convert, left_in_float, targets
from polybit.nn.linear import QuantExperts, QuantLinear, TiedHead
from polybit.nn.switch import use
from tests.families import FAMILIES, prompt, quantize, rtn, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("include_embeddings", [False, True])
def test_converted_model_equals_the_dequantized_float_model(family, include_embeddings):
    model, twin = tiny_model(family), tiny_model(family)
    planes = quantize(model, include_embeddings=include_embeddings)
    places = {target.name: target for target in targets(twin, include_embeddings=True)}
    convert(model, planes)
    seen = []
    for width in (8, 6, 3):
        for name, stored in planes.items():
            weight_OI = unpack(stored).dequantize(width)
            parameter = places[name].parameter(twin)
            parameter.data = weight_OI.T.contiguous() if places[name].kind == "conv1d" else weight_OI.view_as(parameter)
        with torch.no_grad():
            logits = use(model, width)(prompt()).logits
            assert torch.allclose(logits, twin(prompt()).logits, atol=1e-5)
        seen.append(logits)
    assert not torch.equal(seen[0], seen[2]), "the widths must differ, or this test proves nothing"


def test_targets_of_a_llama_are_named_in_order():
    names = [target.name for target in targets(tiny_model("llama"))]
    leaves = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    leaves += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert names == [f"model.layers.{n}.{leaf}" for n in (0, 1) for leaf in leaves]


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_on_the_meta_device_are_the_same(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, sizes = FAMILIES[family]
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    assert targets(empty, include_embeddings=True) == targets(tiny_model(family), include_embeddings=True)


def test_tied_pair_is_one_target_and_one_weight():
    model = tiny_model("llama-tied")
    last = [t for t in targets(model, include_embeddings=True) if t.kind in ("embedding", "head")]
    assert [(t.name, t.tied) for t in last] == [("model.embed_tokens", ("lm_head",))]
    convert(model, quantize(model, include_embeddings=True))
    assert isinstance(model.lm_head, TiedHead) and not list(model.lm_head.parameters())
    assert not any("lm_head" in name for name in model.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_either_a_target_or_named_as_left_in_float(family):
    model = tiny_model(family)
    found = targets(model)
    rows = left_in_float(model, found)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(row.parameters for row in rows) + sum(target.size for target in found) == total
    assert sum(row.share for row in rows) == pytest.approx(1 - sum(t.size for t in found) / total)
    assert not [row for row in rows if "not" in row.reason], "a supported family leaves nothing unexplained"
    assert not any(".0." in row.name for row in rows), "layer numbers are joined"


def test_routers_stay_in_float_and_experts_do_not():
    model = tiny_model("qwen2_moe")
    names = {target.name for target in targets(model)}
    assert "model.layers.0.mlp.experts.gate_up_proj" in names
    assert not names & {"model.layers.0.mlp.gate", "model.layers.0.mlp.shared_expert_gate"}
    assert any(row.reason == "router of the experts" for row in left_in_float(model, targets(model)))
    assert isinstance(convert(model, quantize(model)).model.layers[0].mlp.experts, QuantExperts)


def test_experts_in_another_layout_are_named():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 12))
            self.down_proj = nn.Parameter(torch.zeros(2, 6, 8))

    model = nn.Sequential(Experts())
    assert targets(model) == []
    assert "not supported" in left_in_float(model, [])[0].reason


def test_shared_module_is_replaced_everywhere():
    layer = nn.Linear(8, 4)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(layer)})
    convert(model, {"a": pack(rtn(layer.weight.detach(), 4, 0))})
    assert isinstance(model["a"], QuantLinear) and model["b"][0] is model["a"]


def test_unfitting_planes_are_refused_and_the_model_is_unchanged():
    model = nn.Sequential(nn.Linear(8, 4))
    with pytest.raises(PolybitError, match="shape"):
        convert(model, {"0": pack(rtn(torch.randn(4, 9), 4, 0))})
    with pytest.raises(PolybitError, match="no weights of this model"):
        convert(model, {"7": pack(rtn(torch.randn(4, 8), 4, 0))})
    assert isinstance(model[0], nn.Linear)


def test_half_of_the_experts_is_refused():
    model = tiny_model("mixtral")
    planes = quantize(model)
    del planes["model.layers.1.mlp.experts.down_proj"]
    with pytest.raises(PolybitError, match="lacks down_proj"):
        convert(model, planes)


def test_save_pretrained_of_a_converted_model_is_refused(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(PolybitError, match="checkpoint"):
        convert(model, quantize(model)).save_pretrained(tmp_path)
