"""Codes of several widths in one, narrowest first: each width chooses inside the cell of the next narrower one.

With one latent weight for all widths, the steps that 2 bits need carry the weight through many cells of 4 and 8 bits,
which those widths never asked for. Here width b has a latent weight of its own, and its code

    p_b = clip(code of its latent weight, 2^(b-a) p_a, 2^(b-a) (p_a + 1) - 1),   a = the next narrower width,

may only differ from it in the bits that a does not read. At 2, 4 and 5 bits, the cell of code 1 of 2 bits is 4 to 7 of
4 bits, where 9 is not possible:

    >>> wanted = [torch.tensor([1]), torch.tensor([9]), torch.tensor([15])]
    >>> links = linked(wanted, (2, 4, 5))
    >>> [int(link.code) for link in links], [bool(link.above) for link in links]
    ([1, 7, 15], [False, True, False])

Descent raises what has a negative gradient. At 5 bits the latent weight of 4 bits lies above its cell, so a gradient
that pushes it further goes to 2 bits, whose cell holds it; one that pushes back is its own, and 2 bits follow it:

    >>> [float(share) for share in shares(links, torch.tensor([-1.0]))]
    [-3.0, -0.0, -1.0]
    >>> [float(share) for share in shares(links, torch.tensor([1.0]))]
    [9.0, 3.0, 1.0]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FOLLOW = 3.0  # times a width's gradient that narrower widths' latent weights get although their bits did not decide
PIECE = 1 << 17  # values


@dataclass(frozen=True, slots=True)
class Link:
    """One width of a chain as it is now: its codes p_b, and where the latent weight lies above or below the cell it may
    choose from; tensors of one shape."""

    code: Tensor
    above: Tensor
    below: Tensor


@torch.no_grad()
def linked(wanted: Sequence[Tensor], widths: Sequence[int]) -> list[Link]:
    """The codes of all widths, narrowest first.

    wanted: what each latent weight is nearest to, in codes of its own width; whole numbers, of a type that holds the
    codes, without bounds or none beyond those of the type
    """
    found: list[Link] = []
    for index, (wanted_here, b) in enumerate(zip(wanted, widths, strict=True)):
        if found:
            cells = 1 << (b - widths[index - 1])
            low = found[-1].code * cells
            high = low + (cells - 1)
        else:
            low, high = torch.zeros_like(wanted_here), torch.full_like(wanted_here, (1 << b) - 1)
        code = torch.minimum(torch.maximum(wanted_here, low), high)
        found.append(Link(code, wanted_here > high, wanted_here < low))
    return found


def shares(links: Sequence[Link], gradient: Tensor) -> list[Tensor]:
    """What each latent weight gets of the gradient of the values read at the last of these links.

    It goes to the latent weight of that width where its bits decide. Where the cell of a narrower width holds a code
    back and the gradient pushes against that border, it goes to the narrower width's latent weight instead, and so on;
    past the narrowest it ends. Elsewhere narrower widths follow the wider one's gradient, FOLLOW times (its loss is the
    smaller one): what makes 4 bits better mostly makes 2 bits better too, and each width has only its own few steps
    otherwise.
    """
    found = [torch.empty_like(gradient) for _ in links]
    for part in pieces(gradient):
        left = gradient[part]
        for index in reversed(range(len(links))):
            rises, link = left < 0, links[index]  # in bits: torch.where on bytes takes many times as long
            held = (link.above[part] & rises) | (link.below[part] & ~rises)
            share = torch.mul(left, ~held, out=found[index][part])
            if index:
                left = torch.add(left, share, alpha=FOLLOW - 1)
    return found


def pieces(of: Tensor) -> Iterator[slice]:
    """Rows of a tensor, as many at a time as stay in a core's cache through several operations."""
    rows = max(1, PIECE * len(of) // max(of.numel(), 1))
    yield from (slice(start, start + rows) for start in range(0, len(of), rows))
