"""A model whose weights are lent can be called whole: the loaded one's logits and gradients, and nothing stays behind.

Kinds: reference (the same model loaded), property (weights are taken back, also after an error).
"""

import pytest
import torch
from torch import nn

from polybit.compress.blocks import find_blocks
from polybit.hub.lent import open_lent
from polybit.hub.lent_calls import multiplied
from polybit.hub.load import open_model
from polybit.nn.convert import targets
from tests.families import FAMILIES, tiny_model


class Matrix:
    """Rows of a tensor; counts how many were read at most at once."""

    def __init__(self, weight_OI):
        self.weight_OI, self.shape, self.most = weight_OI, tuple(weight_OI.shape), 0

    def rows(self, start, stop):
        self.most = max(self.most, stop - start)
        return self.weight_OI[start:stop]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("calls") / request.param
    tiny_model(request.param).save_pretrained(directory)
    return open_lent(str(directory)), open_model(str(directory), dtype=torch.float32, trust_remote_code=False)


def test_called_as_a_whole(pair):
    lent, whole = pair
    path, modules = find_blocks(lent.model, targets(lent.model))
    ids_BT = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    there = []  # blocks whose weights are there when a block is called
    handles = [
        module.register_forward_pre_hook(
            lambda *_: there.append(sum(not next(m.parameters()).is_meta for m in modules)), prepend=True
        )
        for module in modules
    ]
    with torch.no_grad():
        wanted_BTV = whole(input_ids=ids_BT, use_cache=False).logits
        with lent.calls(path):
            for _ in range(2):
                assert torch.equal(lent.model(input_ids=ids_BT, use_cache=False).logits, wanted_BTV)
            with pytest.raises(RuntimeError, match="on purpose"), broken(modules[-1]):
                lent.model(input_ids=ids_BT, use_cache=False)
            with lent.lend(f"{path}.0"):
                assert torch.equal(lent.model(input_ids=ids_BT, use_cache=False).logits, wanted_BTV)
    for handle in handles:
        handle.remove()
    assert max(there) <= 1  # the one that somebody holds
    assert all(parameter.is_meta for parameter in lent.model.parameters())


class broken:
    """Inside, a block fails after its weights were lent."""

    def __init__(self, module):
        self.module = module

    def __enter__(self):
        def fail(*_):
            raise RuntimeError("on purpose")

        self.handle = self.module.register_forward_pre_hook(fail)

    def __exit__(self, *_):
        self.handle.remove()


def test_a_head_by_rows_and_its_gradient():
    generator = torch.Generator().manual_seed(1)
    weight_OI, bias_O = torch.randn(70_000, 64, generator=generator), torch.randn(70_000, generator=generator)
    matrix = Matrix(weight_OI)
    x = torch.randn(3, 64, generator=generator, requires_grad=True)
    given = torch.randn(3, 70_000, generator=generator)
    y = multiplied(x, matrix, bias_O)
    (gradient,) = torch.autograd.grad(y, x, given)
    wanted = nn.functional.linear(x, weight_OI, bias_O)
    assert torch.allclose(y, wanted, atol=1e-4)
    assert torch.allclose(gradient, given @ weight_OI, rtol=1e-4, atol=1e-2)
    assert matrix.most == 65_536
