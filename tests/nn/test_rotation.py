"""Rotated models: the function stays, outliers of the stream are spread, what cannot be rotated is refused."""

import copy
from math import cos, pi, sin, sqrt

import pytest
import torch
from torch import nn

from polybit.core.runtime import PolybitError
from polybit.nn.convert import is_tied
from polybit.nn.rotation import Rotation, hadamard, rotate, rotation_of
from tests.families import prompt, quantized, tiny_model

ROTATED = ["llama", "llama-tied", "mistral", "qwen2", "qwen3"]


def lively(family):
    """A tiny model whose norms and biases are no ones and zeros."""
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                drawn = torch.rand(parameter.shape, generator=generator)
                parameter.copy_(drawn + 0.5 if "norm" in name else drawn - 0.5)
    return model


def logits(model):
    with torch.no_grad():
        return model(prompt()).logits


def literal(size):
    """The matrix of `hadamard`, entry by entry."""
    even = max(2**k for k in range(20) if size % 2**k == 0)
    odd = size // even

    def entry(i, j):
        sign = (-1) ** bin(i // odd & j // odd).count("1")
        angle = 2 * pi * (i % odd) * (j % odd) / odd
        return sign * (cos(angle) + sin(angle)) / sqrt(size)

    return torch.tensor([[entry(i, j) for j in range(size)] for i in range(size)], dtype=torch.float64)


@pytest.mark.parametrize("size", [1, 2, 7, 16, 18, 24, 56, 72])
def test_the_transform_is_its_slow_twin_and_orthogonal(size):
    x = torch.randn(3, 5, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    matrix = literal(size)
    assert torch.allclose(hadamard(x), x @ matrix, atol=1e-12)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert matrix.abs().max() <= sqrt(2 / size) + 1e-12  # no channel keeps much of itself


def exact(model):
    """The model in float64, with norms that do not go through float32 as those of transformers do."""

    def wide(norm):
        eps = getattr(norm, "variance_epsilon", None)
        return lambda x: norm.weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

    for module in model.double().modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = wide(module)
    return model


@pytest.mark.parametrize("family", ROTATED)
@pytest.mark.parametrize("most", [1e-5, 1e-12])
def test_the_function_stays(family, most):
    model = lively(family) if most > 1e-10 else exact(lively(family))
    before, old = logits(model), copy.deepcopy(model.state_dict())
    untied = rotate(model, Rotation(7))
    after = logits(model)
    assert (after - before).abs().max() <= most * before.abs().max()
    assert untied == (family in ("llama-tied", "qwen3")) and not is_tied(model)
    assert not model.config.tie_word_embeddings and rotation_of(model) == Rotation(7)
    for name, parameter in model.named_parameters():
        moves = not name.endswith(("q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias"))
        assert torch.equal(parameter, old[name]) != moves
        if "norm" in name and moves:
            assert bool((parameter == 1).all())


def test_all_biases_of_a_llama_follow():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, attention_bias=True, mlp_bias=True)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    before = logits(model)
    rotate(model, Rotation())
    assert (logits(model) - before).abs().max() <= 1e-4 * before.abs().max()


def test_a_head_stays_tied_where_the_last_norm_is_one_number():
    model = lively("llama-tied")
    with torch.no_grad():
        model.model.norm.weight.fill_(1.5)
    before = logits(model)
    assert not rotate(model, Rotation()) and is_tied(model) and model.config.tie_word_embeddings
    assert (logits(model) - before).abs().max() <= 1e-4 * before.abs().max()


def test_an_untied_float_model_is_saved_like_any_other(tmp_path):
    from transformers import AutoModelForCausalLM

    model = lively("llama-tied")
    rotate(model, Rotation())
    model.tie_weights()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(model)) and not is_tied(again)


def test_a_seed_is_a_rotation_of_its_own():
    found = [lively("llama") for _ in range(3)]
    for model, seed in zip(found, (0, 0, 1), strict=True):
        rotate(model, Rotation(seed))
    one, same, other = (model.model.embed_tokens.weight for model in found)
    assert torch.equal(one, same) and not torch.allclose(one, other)


def test_planted_outliers_are_spread():
    model = lively("llama")
    seen = {}

    def peaks(name):
        def hook(_, args):
            seen[name] = max(
                seen.get(name, 0), float((args[0].abs().amax(-1) / args[0].square().mean(-1).sqrt()).mean())
            )

        return hook

    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] = 50
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.v_proj.weight[3] *= 50
            layer.self_attn.q_proj.register_forward_pre_hook(peaks(f"{index} q"))
            layer.self_attn.o_proj.register_forward_pre_hook(peaks(f"{index} o"))
            layer.mlp.up_proj.register_forward_pre_hook(peaks(f"{index} up"))
    logits(model)
    before = dict(seen)
    seen.clear()
    rotate(model, Rotation())
    logits(model)
    assert len(seen) == 6 and all(seen[name] < 0.75 * before[name] for name in seen), (before, seen)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "gpt_neox", "opt", "phi", "gemma", "mixtral", "qwen3_moe"])
def test_other_models_are_refused_unchanged(family):
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PolybitError, match=r"cannot be rotated: only Llama, Mistral, Qwen2, Qwen3"):
        rotate(model, Rotation())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_unknown_layers_and_a_second_time_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj = nn.Sequential(model.model.layers[1].mlp.down_proj)
    with pytest.raises(PolybitError, match=r"layers\.1\.mlp\.down_proj.* no part of a plain Llama"):
        rotate(model, Rotation())
    with pytest.raises(PolybitError, match="no part of a plain Llama"):
        rotate(quantized("llama"), Rotation())
    model = tiny_model("llama")
    rotate(model, Rotation())
    with pytest.raises(PolybitError, match="rotated already"):
        rotate(model, Rotation())


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (3, "a kind and a seed"),
        ({"seed": 1}, "a kind and a seed"),
        ({"kind": "spin", "seed": 1}, "upgrade"),
        ({"kind": "hadamard", "seed": 1.5}, "whole number"),
    ],
)
def test_a_damaged_note_is_named(value, word):
    with pytest.raises(PolybitError, match=word):
        Rotation.from_json(value)
    assert Rotation.from_json(Rotation(4).to_json()) == Rotation(4)
