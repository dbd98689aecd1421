"""Float models that must not be quantized, and names that are no models: one sentence, nothing executed."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from polybit.core.runtime import PolybitError
from polybit.hub.load import load, load_float
from tests.families import tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A good float model with a tokenizer."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("float") / "model"
    tiny_model("llama").save_pretrained(path)
    vocabulary = {f"<{n}>": n for n in range(96)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<0>").save_pretrained(path)
    return path


def refused(path, message):
    with pytest.raises(PolybitError, match=message) as caught:
        load_float(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def edit(path, **values):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


def edit_tensors(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def cut(path):
    (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-10])


def poison(name, value):
    return lambda path: edit_tensors(path, lambda t: t[name].view(-1).__setitem__(3, value))


def only_pickle(path):
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def missing_shard(path):
    (path / "model.safetensors").unlink()
    table = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(table))


def adapter_only(path):
    (path / "config.json").unlink()
    (path / "adapter_config.json").write_text("{}")


def gguf_only(path):
    (path / "config.json").unlink()
    (path / "model.gguf").write_bytes(b"GGUF")


def no_tokenizer(path):
    for file in path.glob("tokenizer*"):
        file.unlink()


DAMAGE = {
    "no configuration": (lambda path: (path / "config.json").unlink(), "has no config.json: give a model"),
    "adapter only": (adapter_only, "only an adapter"),
    "a GGUF file": (gguf_only, r"give the GGUF file itself, .*model\.gguf"),
    "configuration no JSON": (lambda path: (path / "config.json").write_text("{"), "cannot be read as JSON"),
    "unknown architecture": (lambda path: edit(path, model_type="nonsense"), "cannot be used .* architecture"),
    "masked language model": (
        lambda path: edit(path, model_type="bert", architectures=["BertForMaskedLM"]),
        "is a BertForMaskedLM, not a causal language model",
    ),
    "encoder and decoder": (
        lambda path: edit(path, model_type="t5", architectures=["T5ForConditionalGeneration"]),
        "not a causal language model",
    ),
    "quantized by others": (lambda path: edit(path, quantization_config={"quant_method": "gptq"}), r"already \(gptq\)"),
    "1e9 layers": (lambda path: edit(path, num_hidden_layers=10**9), "num_hidden_layers = 1000000000"),
    "more layers": (lambda path: edit(path, num_hidden_layers=3), r"does not hold the weight 'model\.layers\.2"),
    "fewer layers": (
        lambda path: edit(path, num_hidden_layers=1),
        r"another architecture, the weight 'model\.layers\.1",
    ),
    "other width": (lambda path: edit(path, intermediate_size=128), "could not be loaded|another shape"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "has no model.safetensors"),
    "only a pickle": (only_pickle, "only pytorch_model.bin, which can run code"),
    "weights cut": (cut, "model.safetensors .* is no whole safetensors file"),
    "weights empty": (lambda path: (path / "model.safetensors").write_bytes(b""), r"\(0 bytes\) is no whole"),
    "missing shard": (missing_shard, "model-00001-of-00002.safetensors is missing"),
    "NaN": (poison("model.layers.1.mlp.up_proj.weight", torch.nan), r"'model\.layers\.1\.mlp\.up_proj\.weight'.*NaN"),
    "infinity": (poison("model.norm.weight", torch.inf), r"'model\.norm\.weight'.*infinity"),
    "weight gone": (lambda path: edit_tensors(path, lambda t: t.pop("model.norm.weight")), "'model.norm.weight'"),
    "weight too many": (lambda path: edit_tensors(path, lambda t: t.update(x=torch.ones(2))), "no|for another"),
    "no tokenizer": (no_tokenizer, "has no tokenizer"),
    "tokenizer damaged": (
        lambda path: (path / "tokenizer.json").write_text("{"),
        "tokenizer of .* could not be loaded",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_model(case, whole, tmp_path):
    change, message = DAMAGE[case]
    path = shutil.copytree(whole, tmp_path / "bad")
    change(path)
    refused(path, message)


@pytest.mark.parametrize(
    "name",
    [
        "/no/such/directory",
        "../../etc/passwd",
        "./nothing",
        "file:///etc/passwd",
        "https://example.org/model",
        "a/b/c",
        "a..b",
        "",
        " ",
        "x" * 10_000,
        "with\0zero",
        "nobody/never-made-this-one",
    ],
)
def test_names_that_are_no_models(name):
    refused(name, "give|check")


def test_file_instead_of_a_directory(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"GGUF")
    refused(tmp_path / "model.ckpt", "is a file")


def test_a_gguf_file_that_is_cut(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refused(tmp_path / "model.gguf", "no whole GGUF file")


def test_code_beside_the_weights_is_not_executed(whole, tmp_path):
    path = shutil.copytree(whole, tmp_path / "bad")
    (path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    edit(path, model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    refused(path, "trust its authors")
    assert not (tmp_path / "ran").exists()


def test_the_undamaged_original_loads(whole):
    """Or every test above proves nothing."""
    model, tokenizer = load(whole)
    assert not model.training and len(tokenizer) == 96
    assert torch.equal(model.model.norm.weight, tiny_model("llama").model.norm.weight)
