"""Story: a float model is loaded, quantized, saved and loaded again with its tokenizer, template and settings."""

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from polybit.core.runtime import PolybitError
from polybit.hub.checkpoint import save, verify
from polybit.hub.load import LONGEST_SAID, first_line, load, load_float
from polybit.nn.convert import convert
from polybit.nn.linear import QuantLinear
from polybit.nn.switch import multiply_by
from tests.families import prompt, quantize, quantized, tiny_model


@pytest.fixture
def source(tmp_path):
    """A float model with tokenizer, chat template and generation settings."""
    path = tmp_path / "float model@1"
    model = tiny_model("llama-tied")
    model.generation_config.max_length = 33
    model.save_pretrained(path)
    inner = Tokenizer(models.WordLevel({f"<{n}>": n for n in range(96)}, unk_token="<0>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<0>", eos_token="<2>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


def test_the_whole_way(source, tmp_path):
    model, tokenizer = load_float(source)
    convert(model, quantize(model))
    verify(save(model, tmp_path / "out", tokenizer=tokenizer), model)
    again, words = load(tmp_path / "out")
    multiply_by(again, "float")  # as the model in memory does
    with torch.no_grad():
        assert torch.allclose(again(prompt()).logits, model(prompt()).logits, atol=1e-5)
    assert words.get_vocab() == tokenizer.get_vocab() and words.chat_template == tokenizer.chat_template
    assert again.generation_config.max_length == 33 and not again.training
    assert isinstance(again.model.layers[0].mlp.up_proj, QuantLinear)


def test_float_type_is_the_callers(source):
    assert load_float(source)[0].dtype == torch.float32
    assert load(source, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_weights_are_read_from_shards(source, tmp_path):
    model, tokenizer = load_float(source)
    model.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    tokenizer.save_pretrained(tmp_path / "shards")
    again, _ = load_float(tmp_path / "shards")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_a_quantized_checkpoint_is_no_float_model(tmp_path):
    save(quantized("llama"), tmp_path / "out")
    with pytest.raises(PolybitError, match=r"quantized already \(polybit\)"):
        load_float(tmp_path / "out")


def test_a_checkpoint_on_the_hub_is_fetched_whole_and_validated(source, tmp_path, monkeypatch):
    """The hub is played by a directory: symbolic links into a store, as in its cache."""
    import huggingface_hub

    from polybit.hub import load as module

    model, tokenizer = load_float(source)
    convert(model, quantize(model))
    store = save(model, tmp_path / "store", tokenizer=tokenizer)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in store.iterdir():
        (snapshot / file.name).symlink_to(file)
    monkeypatch.setattr(module, "quantization_of", lambda *_, **__: "polybit")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(snapshot))
    again, words = load("somebody/model")
    verify(store, again)
    assert len(words) == 96
    data = bytearray((store / "polybit.safetensors").read_bytes())
    data[-7] ^= 4
    (store / "polybit.safetensors").write_bytes(data)
    with pytest.raises(PolybitError, match="sha256"):
        load("somebody/model")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("No\nsuch file. ", "OSError: No such file."),
        ("Cannot connect.\nCheck your connection or " + "see " * 60, "OSError: Cannot connect"),
        ("x" * 500, "OSError: " + "x" * LONGEST_SAID),
        ("", "OSError"),
    ],
)
def test_somebody_elses_error_ends_with_a_sentence(said, told):
    assert first_line(OSError(said)) == told
