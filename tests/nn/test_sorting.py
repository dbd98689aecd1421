"""Sorted hidden units: the function stays, the columns move."""

import pytest
import torch

from polybit.nn.convert import targets
from polybit.nn.sorting import feed_forwards, sort_units
from tests.families import tiny_model


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2", "gpt_neox", "opt", "phi"])
def test_the_function_stays(family):
    model = tiny_model(family)
    ids_BT = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before_BTV = model(ids_BT).logits
        found = feed_forwards(targets(model))
        assert len(found) == 2
        for layers in found:
            weight_OI = layers.out.weight_OI(model).clone()
            order_I = torch.randperm(layers.out.columns, generator=torch.Generator().manual_seed(1))
            sort_units(model, layers, order_I)
            assert torch.equal(layers.out.weight_OI(model), weight_OI[:, order_I])
        assert torch.allclose(model(ids_BT).logits, before_BTV, atol=1e-4)


def test_experts_are_left_alone():
    assert not feed_forwards(targets(tiny_model("mixtral")))
