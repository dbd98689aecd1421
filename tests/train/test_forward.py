"""Rows read in pieces, what they share once, have the logits and the gradients of one rectangle."""

from itertools import pairwise

import pytest
import torch

from polybit.nn.switch import use
from polybit.train import forward
from polybit.train.forward import at_once, beginning, in_pieces, layout, logits_of, rectangles
from tests.families import FAMILIES, tiny_model
from tests.train.tiny_run import trainable


def part_of_rows():
    """Four rows that begin alike; the third wants nothing, the last is the shortest."""
    ids_BT = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(0))
    ids_BT[:, :4] = ids_BT[0, :4].clone()
    ids_BT[:, 4] = torch.arange(10, 14)
    mask_BT = (torch.arange(12) < torch.tensor([[12], [10], [11], [7]])).long()
    keep_BT = torch.zeros(4, 12, dtype=torch.bool)
    keep_BT[0, 8:], keep_BT[1, 5:9], keep_BT[3, 4:7] = True, True, True
    return {"ids_BT": ids_BT * mask_BT, "mask_BT": mask_BT, "keep_BT": keep_BT}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llama-tied"}))
@pytest.mark.parametrize("shared", [0, 4])
def test_pieces_have_the_logits_of_one_rectangle(family, shared):
    model, part = tiny_model(family), part_of_rows()
    assert beginning(part) == 4
    with torch.no_grad():
        whole = at_once(model, part, model)
        pieces = in_pieces(model, model, part, shared, [[1, 0], [3]])
    if pieces is None:  # a cache that cannot be repeated: states, sliding windows
        assert shared and family != "llama"
        return
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)


def test_pieces_have_the_gradients_of_one_rectangle(monkeypatch):
    model, part = use(trainable((3,)), "w3"), part_of_rows()
    part["ids_BT"] = part["ids_BT"] % model.config.vocab_size
    towards = torch.randn(11, model.config.vocab_size, generator=torch.Generator().manual_seed(1))
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    found = []
    for price in (forward.LAUNCHES, 0):
        monkeypatch.setitem(forward.PASS, "cpu", price)
        model.zero_grad()
        (logits_of(model, part) * towards).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert len(passes) == 1 + 4  # the beginning, and every length by itself
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)
    assert float(found[0].norm()) > 0.1


def test_layouts_are_the_cheapest():
    assert layout([100, 100, 101], 0, 64) == (0, [[0, 1, 2]])
    assert layout([30, 200, 31, 0], 0, 16) == (0, [[1], [0, 2]])
    assert layout([100, 90, 95], 80, 64) == (80, [[0, 1, 2]])
    assert layout([100], 80, 0) == (0, [[0]])
    lengths = [5, 40, 7, 44, 90, 6]
    cuts = [[0, a, b, 6] for a in range(7) for b in range(a, 7)]
    ordered = sorted(lengths)
    costs = [sum((y - x) * ordered[y - 1] + 10 for x, y in pairwise(cut) if y > x) for cut in cuts]
    assert rectangles(lengths, 10)[0] <= min(costs)
