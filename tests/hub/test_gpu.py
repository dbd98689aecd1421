"""A checkpoint moved to a GPU says what it says in main memory, at every width and by every way of asking."""

import pytest
import torch

import polybit
from polybit.core.planes import pack
from polybit.hub.checkpoint import save
from polybit.hub.decode import generate, supported
from polybit.hub.lm import LocalLM
from polybit.hub.load import load, load_float
from polybit.hub.tiny import path
from polybit.kernels import ops
from polybit.nn.convert import convert, targets
from polybit.nn.switch import multiply_by, panel, use
from tests.families import rtn

DEVICE = "cuda"
PROMPTS = ["Hello!", "What is 12 + 7?", "Tell me a story about a dog."]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module", params=[False, True], ids=["float-ends", "quantized-ends"])
def pair(request, tmp_path_factory):
    """The embedded model, rounded to nearest and saved, opened twice: (in main memory, on the GPU)."""
    model, tokenizer = load_float(str(path()))
    found = targets(model, include_embeddings=request.param)
    convert(model, {t.name: pack(rtn(t.weight_OI(model), group_size=64)) for t in found})
    directory = save(model, tmp_path_factory.mktemp("gpu") / "rounded", tokenizer=tokenizer)
    here, tokenizer = load(directory)
    there, _ = load(directory)
    return LocalLM(multiply_by(here, "int16"), tokenizer), LocalLM(multiply_by(there.to(DEVICE)), tokenizer)


def test_a_moved_model_takes_the_gpu_kernels(pair):
    _, there = pair
    layers = panel(there.model).layers.values()
    assert {layer.arithmetic for layer in layers} == {"int16"} == {ops.best_arithmetic(torch.device(DEVICE))}
    assert all(tensor.device.type == DEVICE for layer in layers for tensor in layer.parameters())
    assert not supported(there.model)


@pytest.mark.parametrize("precision", ["w8", "w5", "w4", "w3", "w4a8", "w8k8v4"])
def test_same_tokens(pair, precision):
    here, there = (lm.at(precision) for lm in pair)
    with here as a, there as b:
        assert a.generate(PROMPTS, max_tokens=24) == b.generate(PROMPTS, max_tokens=24)


def test_same_tokens_by_transformers_generate(pair):
    here, there = pair
    ids = here.tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    for width in (8, 4):
        use(here.model, width)
        use(there.model, width)
        expected = generate(here.model, ids, **options)
        assert torch.equal(generate(there.model, ids.to(DEVICE), **options).cpu(), expected)
        assert torch.equal(there.model.generate(ids.to(DEVICE), **options).cpu(), expected)


def test_same_logits_and_likelihoods(pair):
    here, there = pair
    ids = torch.randint(5, 200, (3, 40), generator=torch.Generator().manual_seed(0))
    for width in (8, 3):
        use(here.model, width)
        use(there.model, width)
        expected = here.logits(ids)
        assert (there.logits(ids).cpu() - expected).abs().max() <= 2e-3 * expected.abs().max()
    a, b = (lm.loglik([("Hello", " world")])[0].total_nats for lm in pair)
    assert abs(a - b) <= 1e-2


def test_eval_reads_the_same_numbers_on_the_gpu(tmp_path):
    here, there = (
        polybit.evaluate("tinychat", windows=2, window=64, answers=2, max_tokens=8, device=device).numbers
        for device in ("cpu", DEVICE)
    )
    [one], [two] = here["presets"].values(), there["presets"].values()
    assert two["perplexity"]["value"] == pytest.approx(one["perplexity"]["value"], rel=1e-4)
    assert two["kl"]["value"] == pytest.approx(one["kl"]["value"], abs=1e-6)
