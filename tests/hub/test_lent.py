"""Lent weights are those a whole model would have been loaded with, and nothing of them stays behind.

Kinds: oracle (from_pretrained), property (what is lent is taken back), refusals.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from polybit.compress.blocks import find_blocks
from polybit.core.runtime import PolybitError
from polybit.hub.lent import open_lent
from polybit.hub.load import open_model
from polybit.hub.workspace import model_digest
from polybit.nn.convert import left_in_float, targets
from tests.families import FAMILIES, tiny_model


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    """A model lent from files, and the same loaded whole."""
    directory = tmp_path_factory.mktemp("lent") / request.param
    tiny_model(request.param).bfloat16().save_pretrained(directory)
    return open_lent(str(directory)), open_model(str(directory), dtype=torch.float32, trust_remote_code=False)


def test_a_lent_model_is_the_loaded_one_without_weights(pair):
    lent, whole = pair
    assert list(lent.model.state_dict()) == list(whole.state_dict())
    assert targets(lent.model, include_embeddings=True) == targets(whole, include_embeddings=True)
    assert left_in_float(lent.model, targets(lent.model)) == left_in_float(whole, targets(whole))
    assert all(parameter.is_meta for parameter in lent.model.parameters())
    computed = dict(lent.model.named_buffers())
    assert all(torch.equal(computed[name], buffer) for name, buffer in whole.named_buffers())
    assert lent.digest() == model_digest(whole)


def test_what_is_lent_is_what_would_have_been_loaded_and_is_taken_back(pair):
    lent, whole = pair
    name, modules = find_blocks(lent.model, targets(lent.model))
    for index in range(len(modules)):
        path = f"{name}.{index}"
        with lent.lend(path), lent.lend(path):
            found = dict(lent.model.named_parameters())
            for key, parameter in whole.named_parameters():
                assert torch.equal(found[key], parameter) if key.startswith(f"{path}.") else found[key].is_meta, key
        assert all(parameter.is_meta for parameter in lent.model.parameters())
    for key, tensor in whole.state_dict().items():
        assert torch.equal(torch.cat([piece.flatten() for piece in lent.pieces(key)]), tensor.flatten())


def test_two_tied_weights_that_are_stored_apart_are_not_lent(tmp_path):
    tiny_model("llama-tied").save_pretrained(tmp_path)
    assert open_lent(str(tmp_path)) is not None
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": torch.ones(96, 72)}, tmp_path / "model.safetensors", {"format": "pt"})
    assert open_lent(str(tmp_path)) is None


def test_weights_that_are_missing_or_no_numbers_are_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"
    torch.nn.init.constant_(tensors[lost], torch.nan)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(PolybitError, match=f"{lost}.*NaN or infinity"):
        open_lent(str(tmp_path)).digest()
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(PolybitError, match=f"does not hold the weight '{lost}'"):
        open_lent(str(tmp_path))


def test_files_that_change_while_they_are_read_are_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    lent = open_lent(str(tmp_path))
    with lent.lend("model.layers.0"):
        pass
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes() + b" ")
    with pytest.raises(PolybitError, match="was changed while it was read"), lent.lend("model.layers.0"):
        pass
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(PolybitError, match="cannot be read any more"):
        list(lent.pieces("model.norm.weight"))
