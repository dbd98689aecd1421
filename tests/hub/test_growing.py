"""A cache with room says what transformers' own does, bit for bit, also where it branches."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.cache_utils import DynamicLayer

from polybit.hub.growing import LEAST, RoomyLayer, with_room

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def models():
    """One with plain layers, one with a sliding window."""
    torch.manual_seed(0)
    full = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    return [full, MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8)).eval()]


def opened(model, rows=3):
    ids = torch.arange(rows * 5).reshape(rows, 5) % 40
    return model(ids, use_cache=True).past_key_values


def said(model, cache, steps, first=0):
    """Logits of some steps, each of one more token."""
    rows = cache.layers[0].keys.shape[0]
    found = [model(torch.full((rows, 1), (first + n) % 40), past_key_values=cache).logits for n in range(steps)]
    return torch.cat(found, 1)


@pytest.mark.parametrize("model", models(), ids=["full", "sliding"])
@pytest.mark.parametrize("inference", [True, False])
def test_the_same_logits_over_more_tokens_than_there_was_room(model, inference):
    with torch.inference_mode() if inference else torch.no_grad():
        plain, roomy = opened(model), with_room(opened(model))
        assert torch.equal(said(model, plain, LEAST + 20), said(model, roomy, LEAST + 20))
        for change in ("select", "crop", "reorder"):
            for cache in (plain, roomy):
                if change == "select":
                    cache.batch_select_indices(torch.tensor([2, 0]))
                elif change == "crop" and not any(layer.is_sliding for layer in cache.layers):
                    cache.crop(-7)
                elif change == "reorder":
                    cache.reorder_cache(torch.tensor([1, 0]))
            assert torch.equal(said(model, plain, 3, first=5), said(model, roomy, 3, first=5)), change


def test_most_steps_copy_nothing():
    model = models()[0]
    with torch.no_grad():
        cache = with_room(opened(model))
        said(model, cache, 1)
        place = cache.layers[0].keys.data_ptr()
        said(model, cache, LEAST - 2)
        assert isinstance(cache.layers[0], RoomyLayer) and cache.layers[0].keys.data_ptr() == place
        said(model, cache, 4)
        assert cache.layers[0].keys.data_ptr() != place


def test_branches_do_not_write_over_each_other():
    model = models()[0]
    with torch.no_grad():
        one = with_room(opened(model))
        said(model, one, 2)
        other = copy.copy(one)
        other.layers = [copy.copy(layer) for layer in one.layers]
        mine, theirs = said(model, one, 3, first=7), said(model, other, 3, first=20)
        fresh = opened(model)
        said(model, fresh, 2)
        assert torch.equal(mine, said(model, copy.deepcopy(fresh), 3, first=7))
        assert torch.equal(theirs, said(model, fresh, 3, first=20))


def test_tokens_taken_in_without_inference_follow_those_taken_in_with_it():
    model = models()[0]
    with torch.inference_mode():
        roomy, plain = with_room(opened(model)), opened(model)
        said(model, roomy, 2), said(model, plain, 2)
    with torch.no_grad():
        assert torch.equal(said(model, roomy, 2), said(model, plain, 2))


def test_what_learns_and_what_is_no_plain_cache_is_left_alone():
    model = models()[0]
    cache = with_room(opened(model))
    said(model, cache, 2).sum().backward()
    assert all(type(layer) is RoomyLayer and not layer.held for layer in cache.layers)
    assert with_room(None) is None
    kept = opened(models()[1])
    assert not any(type(layer) is DynamicLayer for layer in kept.layers)
    assert [type(a) for a in with_room(kept).layers] == [type(a) for a in kept.layers]
