"""Nested low-rank adapters inside the quantizer: a narrower width uses more columns of the same two factors."""

from __future__ import annotations

from math import ceil, sqrt

import torch
from torch import Tensor, nn

RANK_SHARES = {2: 1.0, 3: 1.0, 4: 1.0, 5: 2 / 3, 6: 2 / 3, 7: 1 / 3, 8: 1 / 3}


def rank_at(rank: int, width: int) -> int:
    """Rank of the nested adapter at a width: `rank` at 4 bits and below, two thirds at 5 and 6, a third at 7 and 8.

    The shares are QuEPT's (AAAI 2026: 192 / 128 / 64).
    """
    return max(1, ceil(rank * RANK_SHARES[width] - 1e-9))


class NestedAdapter(nn.Module):
    """W + B[:, :r_b] A[:r_b], quantized after it is added: narrower widths use more of the same columns (QuEPT)."""

    def __init__(self, rows: int, columns: int, rank: int, like: Tensor, draw: torch.Generator | None = None) -> None:
        super().__init__()
        self.rank = rank
        down_RI = nn.init.normal_(torch.empty(rank, columns, device="cpu"), std=1 / sqrt(columns), generator=draw)
        self.down_RI = nn.Parameter(down_RI.to(like))
        self.up_OR = nn.Parameter(like.new_zeros(rows, rank))

    def forward(self, width: int) -> Tensor:
        """What is added to the weight before it is quantized to `width` bits, [O, I]."""
        rank = rank_at(self.rank, width)
        return self.up_OR[:, :rank] @ self.down_RI[:rank]

    def versions(self) -> tuple[int, int]:
        """Changes when an optimizer moves the adapter."""
        return self.down_RI._version, self.up_OR._version
