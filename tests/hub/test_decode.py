"""The fast path of one sequence: its logits are the model's own, its tokens those of model.generate."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from polybit.core.affine import Grid
from polybit.core.planes import pack
from polybit.hub import decode
from polybit.hub.checkpoint import save
from polybit.hub.load import load_quantized
from polybit.kernels import step
from polybit.nn import switch
from polybit.nn.convert import convert, targets
from polybit.quant.rtn import rtn

pytestmark = pytest.mark.skipif(step.library() is None, reason="needs the compiled kernels")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama3 rotation": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral window": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
}


def make(family):
    """A random model whose norms and biases are not the trivial ones."""
    configuration, kind, more = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(configuration(**SIZES, **more)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def quantize(model):
    """Round every weight, ends too, and multiply by the compiled kernels."""
    chosen = targets(model, include_embeddings=True)
    convert(model, {t.name: pack(rtn(t.weight_OI(model), None, Grid(8, 32, "group"))) for t in chosen})
    return switch.multiply_by(model)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_step_equals_a_forward_pass_of_the_whole_text(family, quantized):
    model = quantize(make(family)) if quantized else make(family)
    ids = torch.randint(0, 128, (1, 20), generator=torch.Generator().manual_seed(1))
    assert decode.supported(model)
    decoder = decode.Decoder(model, 20)
    with torch.inference_mode():
        expected = model(ids).logits[0, 11:]
        found = [decoder.read(ids[:, :12])[0], *(decoder.step(int(t))[0] for t in ids[0, 12:])]
    error = (torch.stack(found) - expected).abs().max() / expected.abs().max()
    # activations rounded to 16 bits may fall to the other side of a step
    assert error < (1e-3 if quantized else 2e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "temperature": 0.8, "top_k": 20}])
def test_tokens_are_those_of_generate(family, options):
    model, ids = make(family), torch.randint(0, 128, (1, 9), generator=torch.Generator().manual_seed(2))
    options = options | {"max_new_tokens": 40, "pad_token_id": 0, "repetition_penalty": 1.1}
    torch.manual_seed(3)
    expected = model.generate(ids, **options)
    torch.manual_seed(3)
    assert torch.equal(decode.generate(model, ids, **options), expected)


def test_a_switched_model_is_read_at_its_new_width():
    model = quantize(make("llama"))
    ids = torch.arange(5, 17)[None]
    with switch.at(model, "w3"):
        expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        found = decode.generate(model, ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(found, expected)
    decoder = decode.Decoder(model, 20)
    decoder.read(ids)
    wide = decoder.step(5)
    decoder.length -= 1
    with switch.at(model, "w2"):
        narrow = decoder.step(5)
    assert not torch.allclose(wide, narrow, atol=1e-2)


def test_ends_at_the_end_token_and_streams():
    model, ids = make("llama"), torch.arange(5, 17)[None]
    answer = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 12:]
    heard = []

    class Streamer:
        def put(self, value):
            heard.append(value.flatten().tolist())

        def end(self):
            heard.append("end")

    end = int(answer[4])
    out = decode.generate(model, ids, max_new_tokens=12, do_sample=False, eos_token_id=end, streamer=Streamer())
    assert out[0, 12:].tolist() == answer[: answer.tolist().index(end) + 1].tolist()
    assert heard[-1] == "end" and heard[0] == ids[0].tolist() and len(heard) == 2 + out.shape[1] - 12


def test_what_it_does_not_know_goes_the_plain_way():
    other = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=64)).eval()
    assert not decode.supported(other)
    ids = torch.arange(5, 9)[None]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(decode.generate(other, ids, **options), other.generate(ids, **options))
    model = make("llama")
    with_hook = model.register_forward_pre_hook(lambda *_: None)
    assert not decode.supported(model)  # as random precision does: a draw per forward pass
    with_hook.remove()
    assert decode.supported(model)
    assert not decode.supported(make("llama").bfloat16())
    two = torch.stack([ids[0], ids[0] + 1])
    assert decode.generate(model, two, **options).shape == (2, 9)


@pytest.mark.parametrize("arithmetic", ["float", "int16"])
def test_layers_the_kernels_cannot_take_together_are_asked_one_by_one(arithmetic):
    """Another way to multiply, rounded activations, a bias in a layer's own type: each step is still the model's."""
    model = quantize(make("qwen2"))
    layers = switch.panel(model).layers
    layers["model.layers.0.self_attn.k_proj"].arithmetic = arithmetic
    layers["model.layers.1.mlp.up_proj"].keep = True
    ids = torch.randint(0, 128, (1, 14), generator=torch.Generator().manual_seed(1))
    decoder = decode.Decoder(model, 14)
    with torch.inference_mode(), switch.at(model, "w5a8"):
        expected = model(ids).logits[0, 9:]
        found = [decoder.read(ids[:, :10])[0], *(decoder.step(int(t))[0] for t in ids[0, 10:])]
    # rounding to 8 bits falls to the other side of a step now and then
    assert (torch.stack(found) - expected).abs().max() / expected.abs().max() < 0.02
    with torch.inference_mode():
        expected = model(ids).logits[0, 9:]
        found = [decoder.read(ids[:, :10])[0], *(decoder.step(int(t))[0] for t in ids[0, 10:])]
    assert (torch.stack(found) - expected).abs().max() / expected.abs().max() < 1e-3


def test_a_loaded_checkpoint_takes_the_fast_path(tmp_path):
    """The hook that packs caches stands on every loaded model, and is no reason to go the slow way."""
    model = make("llama")
    convert(model, {t.name: pack(rtn(t.weight_OI(model), None, Grid(8, 32, "group"))) for t in targets(model)})
    loaded, _ = load_quantized(str(save(model, tmp_path / "out", widths=(8, 4))))
    assert decode.supported(loaded)
    with switch.at(loaded, "w8k8v8"):
        assert not decode.supported(loaded)
