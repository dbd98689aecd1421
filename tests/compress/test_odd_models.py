"""Models unlike the others: what can be quantized is; of the rest one sentence names the architecture or the token."""

import pytest
import torch
from torch import nn

from polybit.compress.blocks import run_blocks
from polybit.compress.self_text import self_text
from polybit.core.planes import unpack
from polybit.core.runtime import PolybitError
from polybit.hub.lm import LocalLM
from polybit.hub.load import load
from polybit.nn.convert import computes_linear, convert, is_linear, targets
from tests.evals.tiny import tokenizer
from tests.families import GPT2, SIZES, quantize, tiny_model


def made(kind: str, **sizes) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32).eval()


def test_subclasses_that_compute_the_same_are_linear():
    from transformers.models.falcon.modeling_falcon import FalconLinear
    from transformers.models.llama4.modeling_llama4 import Llama4Router

    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    class Named(nn.Linear):
        pass

    others = Doubled(4, 2), nn.Embedding(4, 2), None
    assert all(is_linear(kind(4, 2)) for kind in (nn.Linear, FalconLinear, Named))
    before = torch.random.get_rng_state()
    assert not any(map(is_linear, others)) and not computes_linear(Llama4Router)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("family", ["falcon", "falcon-new"])
def test_falcon_answers_as_its_dequantized_weights_do(family):
    ids = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(1))
    dense = tiny_model(family)
    planes = quantize(dense)
    assert len(planes) == 8  # two blocks of query_key_value, dense and two of the MLP
    model = convert(tiny_model(family), planes)
    with torch.no_grad():
        for target in targets(dense):
            target.parameter(dense).copy_(unpack(planes[target.name]).dequantize())
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["openai-gpt", "mamba"])
def test_models_without_a_cache_of_keys_write_text(kind):
    sizes = GPT2 if kind == "openai-gpt" else {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2}
    model = made(kind, **sizes)
    ids = self_text(model, 1, count=2, length=6, seed=0)
    assert ids.shape == (2, 6) and len([b.finish() for b in run_blocks(model, [ids], targets(model))]) == 2
    answers = LocalLM(model, tokenizer()).generate_tokens([[1, 5], [1, 7]], max_tokens=3)
    with torch.no_grad():
        for start, answer in zip(([1, 5], [1, 7]), answers, strict=True):
            for token in answer:
                assert token == int(model(torch.tensor([start])).logits[0, -1].argmax())
                start.append(token)


def test_an_architecture_that_changes_its_own_weights_is_refused():
    with pytest.raises(PolybitError, match=r"RwkvForCausalLM .* cannot be quantized"):
        targets(made("rwkv", vocab_size=96, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2))


def test_blocks_in_another_order_are_refused():
    model = tiny_model("llama")
    model.model.layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(PolybitError, match=r"LlamaForCausalLM does not hand .*--method rtn"):
        next(iter(run_blocks(model, [torch.ones(1, 4, dtype=torch.long)], targets(model))))


def test_a_tokenizer_with_more_entries_than_the_embedding(tmp_path):
    model, words = made("llama", **SIZES), tokenizer()
    words.add_tokens([f"<{n}>" for n in range(96)])
    assert len(words) > 96
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path)
    loaded(input_ids=torch.tensor([[1, 95]]))
    for call in (lambda ids: loaded(input_ids=ids), loaded):
        with pytest.raises(PolybitError, match="has the token 96, and the model's embedding has 96 rows"):
            call(torch.tensor([[1, 96]]))
