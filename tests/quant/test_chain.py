"""The codes of several widths in one: reference (a literal twin per weight), who gets the gradient."""

import pytest
import torch

from polybit.quant import chain
from polybit.quant.chain import Link, linked, shares


def literal(wanted, widths):
    """The codes of one weight, by the sentence of the module."""
    codes, low, high = [], 0, 2 ** widths[0] - 1
    for index, (value, b) in enumerate(zip(wanted, widths, strict=True)):
        if index:
            wider = b - widths[index - 1]
            low, high = codes[-1] << wider, (codes[-1] << wider) + (1 << wider) - 1
        codes.append(min(max(value, low), high))
    return codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
@pytest.mark.parametrize("widths", [(2, 3, 4, 5), (2, 4), (3,), (4, 8)])
def test_codes_equal_the_literal_twin(widths, dtype):
    draw = torch.Generator().manual_seed(0)
    wanted = [torch.randint(-3, 2**b + 3, (5, 8), generator=draw) for b in widths]
    links = linked([w.to(dtype) for w in wanted], widths)
    for row in range(5):
        for column in range(8):
            expected = literal([int(w[row, column]) for w in wanted], widths)
            assert [int(link.code[row, column]) for link in links] == expected
    for w, link in zip(wanted, links, strict=True):
        assert torch.equal(link.above, w > link.code) and torch.equal(link.below, w < link.code)


def test_gradient_goes_to_who_decides(monkeypatch):
    """Three weights: free, held by the cell of the narrower width, beyond the range; pushed up and down."""
    yes, no = torch.tensor([[False, True, True]]), torch.tensor([[False, False, False]])
    narrow = Link(torch.zeros(1, 3), torch.tensor([[False, False, True]]), no)
    wide = Link(torch.zeros(1, 3), yes, no)
    cases = {
        (-1.0, 0.0): ([[0, -1, 0]], [[-1, 0, 0]]),
        (1.0, 0.0): ([[0, 0, 0]], [[1, 1, 1]]),
        (-1.0, 0.5): ([[-0.5, -1, 0]], [[-1, 0, 0]]),
        (1.0, 0.5): ([[0.5, 0.5, 0.5]], [[1, 1, 1]]),
    }
    for (sign, follow), wanted in cases.items():
        monkeypatch.setattr(chain, "FOLLOW", follow)
        found = shares([narrow, wide], torch.full((1, 3), sign))
        for share, expected in zip(found, wanted, strict=True):
            assert torch.equal(share, torch.tensor(expected, dtype=torch.float32)), sign
