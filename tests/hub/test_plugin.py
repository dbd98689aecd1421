"""Oracle: plain transformers loads our directories and computes what the model in memory computes; else it fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polybit.core.plan import Plan
from polybit.core.runtime import PolybitError
from polybit.hub.checkpoint import save, stored_tensors, validate, verify
from polybit.hub.directory import write_manifest
from polybit.kernels import ops
from polybit.nn.linear import QuantWeight
from polybit.nn.switch import current, multiply_by, presets, set_presets, use
from tests.families import FAMILIES, prompt, quantized

ROOT = Path(__file__).parents[2]


def reopen(path, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("include_embeddings", [False, True])
def test_round_trip_through_plain_transformers(family, include_embeddings, tmp_path):
    model = quantized(family, include_embeddings=include_embeddings)
    again = reopen(save(model, tmp_path / "out"))
    ours, theirs = dict(stored_tensors(model)), dict(stored_tensors(again))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    multiply_by(again, "float")  # as a model in memory does; a loaded one takes the fastest way
    for width in (8, 5, 2):
        use(model, width)
        use(again, width)
        with torch.no_grad():
            assert torch.allclose(model(prompt()).logits, again(prompt()).logits, atol=1e-5)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt(), **options), again.generate(prompt(), **options))


def test_a_loaded_model_multiplies_by_the_compiled_kernels_and_differentiates_exactly(tmp_path):
    model = quantized("llama")
    again = reopen(save(model, tmp_path / "out"))
    assert {layer.arithmetic for layer in again.modules() if isinstance(layer, QuantWeight)} == {ops.best_arithmetic()}
    with torch.no_grad():
        fast, exact = again(prompt()).logits, model(prompt()).logits
    assert (fast - exact).abs().max() <= 1e-3 * exact.abs().max()
    gradients = []
    for one in (model, again):
        x = one.get_input_embeddings()(prompt()).detach().requires_grad_()
        one(inputs_embeds=x).logits.square().sum().backward()
        gradients.append(x.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_shards_load(tmp_path):
    model = quantized("mixtral", include_embeddings=True)
    again = reopen(save(model, tmp_path / "out", shard_bytes=40_000))
    assert len(list((tmp_path / "out").glob("polybit-*.safetensors"))) > 1
    verify(tmp_path / "out", again)


def test_presets_come_back_and_the_model_starts_at_all_stored_bits(tmp_path):
    model = quantized("llama")
    set_presets(model, {"B": Plan.uniform("w4a8")})
    again = reopen(save(model, tmp_path / "out"))
    assert current(again) == Plan() and presets(again) == {"B": Plan.uniform("w4a8")}
    assert str(current(use(again, "B")).default) == "w4a8"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_in_another_type_keeps_the_stored_weight_exact(dtype, tmp_path):
    model = quantized("llama-tied", include_embeddings=True)
    again = reopen(save(model, tmp_path / "out"), dtype=dtype)
    for name, layer in again.named_modules():
        if isinstance(layer, QuantWeight):
            assert torch.equal(layer.decode(), model.get_submodule(name).decode())
    assert again.model.norm.weight.dtype == dtype
    with torch.no_grad():
        assert again(prompt()).logits.dtype == dtype


def test_footprint_is_that_of_the_stored_bits(tmp_path):
    model = quantized("llama", bits=4)
    stored = sum(layer.planes.nbytes() for layer in model.modules() if isinstance(layer, QuantWeight))
    floats = sum(4 * p.numel() for p in model.parameters() if p.is_floating_point())
    again = reopen(save(model, tmp_path / "out"))
    buffers = sum(b.numel() * b.element_size() for b in again.buffers())
    assert again.get_memory_footprint() == stored + floats + buffers


def test_save_pretrained_writes_a_whole_checkpoint(tmp_path):
    model = quantized("qwen3", include_embeddings=True)
    set_presets(model, {"A": Plan.uniform("w8a8")})
    again = reopen(save(model, tmp_path / "out", widths=(8, 4), notes={"x": 1}))
    again.save_pretrained(tmp_path / "second")
    found = validate(tmp_path / "second")
    assert found == validate(tmp_path / "out") and found.widths == (8, 4) and found.notes == {"x": 1}
    again.save_pretrained(tmp_path / "second")
    verify(tmp_path / "second", reopen(tmp_path / "second"))
    with pytest.raises(PolybitError, match="push_to_hub"):
        again.save_pretrained(tmp_path / "third", push_to_hub=True)


def test_transformers_own_writer_refuses(tmp_path):
    from transformers import PreTrainedModel

    again = reopen(save(quantized("llama"), tmp_path / "out"))
    with pytest.raises(ValueError, match="not serializable"):
        PreTrainedModel.save_pretrained(again, tmp_path / "bad")


def test_quantizing_while_loading_is_refused(tmp_path):
    from polybit.hub.plugin import PolybitConfig
    from tests.families import tiny_model

    tiny_model("llama").save_pretrained(tmp_path / "float")
    with pytest.raises(PolybitError, match="polybit quantize"):
        reopen(tmp_path / "float", quantization_config=PolybitConfig())


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.mlp.up_proj.qplanes", "model.embed_tokens.weight"]
)
def test_a_missing_tensor_is_never_invented(name, tmp_path):
    """Even with a manifest that agrees with the damaged file."""
    path = save(quantized("llama"), tmp_path / "out")
    tensors = load_file(path / "polybit.safetensors")
    del tensors[name]
    save_file(tensors, path / "polybit.safetensors", metadata={"format": "pt"})
    write_manifest(path)
    with pytest.raises(PolybitError, match=name):
        reopen(path)


def test_a_float_tensor_of_another_shape_is_refused(tmp_path):
    path = save(quantized("llama"), tmp_path / "out")
    tensors = load_file(path / "polybit.safetensors")
    tensors["model.norm.weight"] = torch.ones(71)
    save_file(tensors, path / "polybit.safetensors", metadata={"format": "pt"})
    write_manifest(path)
    with pytest.raises(PolybitError, match=r"model\.norm\.weight.*shape"):
        reopen(path)


def test_copies_and_training_flags(tmp_path):
    import copy

    again = reopen(save(quantized("llama"), tmp_path / "out"))
    other = use(copy.deepcopy(again), 2)
    assert str(current(again).default) == "float" and str(current(other).default) == "w2"
    assert again.hf_quantizer.is_trainable and again.hf_quantizer.is_qat_trainable
    assert not any(p.requires_grad for n, p in again.named_parameters() if n.endswith(("qplanes", "scale", "zero")))


SCRIPT = """
import sys
exec(sys.argv[2])
from transformers import AutoModelForCausalLM
try:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    print("loaded", type(model.model.layers[0].mlp.up_proj).__name__)
except Exception as error:
    print("refused", type(error).__name__, error)
"""


def in_a_script(path, first, autoload):
    """What a script that never imports polybit prints."""
    environment = {
        **os.environ,
        "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", SCRIPT, path, first]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=path)
    return done.stdout + done.stderr[-2000:] * (not done.stdout)


@pytest.mark.parametrize(
    "first",
    [
        "import torch",
        pytest.param("import transformers", marks=pytest.mark.slow),
        pytest.param("from transformers.quantizers import HfQuantizer", marks=pytest.mark.slow),
        pytest.param("import transformers.modeling_utils", marks=pytest.mark.slow),
        pytest.param("import transformers.quantizers.auto, torch", marks=pytest.mark.slow),
        pytest.param("from transformers import LlamaForCausalLM", marks=pytest.mark.slow),
    ],
)
def test_plain_script_loads_without_importing_polybit(first, tmp_path):
    """Through torch's entry point, whatever is imported first."""
    assert in_a_script(save(quantized("llama"), tmp_path / "out"), first, "1").startswith("loaded QuantLinear")


@pytest.mark.slow
def test_script_without_polybit_is_refused(tmp_path):
    said = in_a_script(save(quantized("llama"), tmp_path / "out"), "import torch", "0")
    assert said.startswith("refused OSError") and "model.safetensors" in said


def test_transformers_without_polybit_fails_and_never_gives_random_weights(tmp_path, monkeypatch):
    """The quick twin of the script: our two entries are taken out of transformers' tables."""
    from transformers.quantizers import auto

    path = save(quantized("llama"), tmp_path / "out")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "polybit")
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "polybit")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        reopen(path)


def test_autoload_never_raises(monkeypatch):
    from polybit import autoload

    def fail(*_):
        raise RuntimeError

    monkeypatch.setattr(autoload, "attach", fail)
    autoload.register()
    monkeypatch.undo()
    monkeypatch.setattr(autoload.importlib, "import_module", fail)
    autoload.register()


def test_a_model_without_its_head_says_that_the_head_is_missing(tmp_path):
    from transformers import AutoModel

    save(quantized("llama"), tmp_path / "model", widths=(8,))
    with pytest.raises(PolybitError, match=r"lacks the head .* AutoModelForCausalLM"):
        AutoModel.from_pretrained(tmp_path / "model")
