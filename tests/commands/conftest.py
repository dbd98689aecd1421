"""A tiny random Llama on disk, with the embedded model's tokenizer, small enough for whole runs in seconds."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from polybit.hub.tiny import path


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Directory of a 2-layer Llama with hidden size 48 and an odd feed-forward of 72."""
    torch.manual_seed(0)
    vocabulary = len(json.loads((path() / "tokenizer.json").read_text())["model"]["vocab"])
    base = json.loads((path() / "config.json").read_text())
    config = LlamaConfig(
        vocab_size=max(vocabulary, base["vocab_size"]),
        hidden_size=48,
        intermediate_size=72,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.15,  # large enough that rounding shows
        bos_token_id=base.get("bos_token_id"),
        eos_token_id=base.get("eos_token_id"),
        pad_token_id=base.get("pad_token_id"),
    )
    directory = tmp_path_factory.mktemp("tiny") / "llama"
    LlamaForCausalLM(config).save_pretrained(directory)
    for file in path().iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(file, directory / file.name)
    return directory


@pytest.fixture
def broken_llama(tiny_llama, tmp_path):
    """A function that copies the tiny model, changes its tensors, and gives the new directory."""
    from safetensors.torch import load_file

    def make(change):
        directory = tmp_path / "broken"
        shutil.copytree(tiny_llama, directory)
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return make
