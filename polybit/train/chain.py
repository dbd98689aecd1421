"""One nested code trained at several widths, a latent weight for each: what one width learns stays inside its bits.

quant/chain.py says how the codes of the widths hang together. Here they are those of one layer that is trained by
whatever loss; widths above the widest trained one keep the bits of the start as far as its cells allow: a weight whose
narrow codes did not change reads as before, to the last bit.

Two weights with codes 9 and 5 of 4 bits, trained at 4 and 2 bits. At 2 bits they are codes 2 and 1, which stand for the
cells 8 to 11 and 4 to 7. Pushed up by 5, the latent weights of 4 bits reach the ends of these cells and no further, so
2 bits read what they read before:

    >>> import torch
    >>> q = QWeight(torch.tensor([[9, 5]], dtype=torch.uint8), torch.tensor([[1.0]]), torch.tensor([[8.0]]), 4, 0)
    >>> chain = Chain(q, Grid(4, 0, "group"), (4, 2), q.dequantize())
    >>> _ = chain.latents["4"].data.add_(5 / PACE[4])
    >>> chain.encode().codes_OI.tolist(), (chain.encode().codes_OI >> 2).tolist()
    ([[11, 7]], [[2, 1]])

When those of 2 bits move by one cell, 4 bits come free:

    >>> _ = chain.latents["2"].data.add_(4 / PACE[2])
    >>> chain.encode().codes_OI.tolist(), (chain.encode().codes_OI >> 2).tolist()
    ([[14, 10]], [[3, 2]])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polybit.core.affine import Grid, QWeight, expand_groups, round_half_up
from polybit.core.records import LayerStats
from polybit.quant.chain import Link, linked, shares
from polybit.quant.lower_bits import lower_bits
from polybit.train.straight import Clock, Code

# How fast the latent weights of a width move for one learning rate, which Adam makes the size of a step whatever the
# gradient: a cell of 2 bits is wide, one of 8 narrow. Latent weights are kept divided by these.
PACE = {2: 1.0, 3: 1.0, 4: 0.3, 5: 0.15, 6: 0.08, 7: 0.04, 8: 0.02}


class ThroughChain(torch.autograd.Function):
    """The stored value at one width; the gradient is shared among the latent weights it was read from."""

    @staticmethod
    def forward(ctx: Any, value_OI: Tensor, links: Sequence[Link], *latents_OI: Tensor) -> Tensor:
        """links, latents_OI: from the narrowest width to the one that is read."""
        ctx.links = links
        return value_OI.view_as(value_OI)

    @staticmethod
    def backward(ctx: Any, grad_OI: Tensor) -> tuple[Tensor | None, ...]:
        """Every latent weight's share."""
        return None, None, *shares(ctx.links, grad_OI)


class Chain(Code):
    """A `Code` with a latent weight per trained width; scales, zero points and ratios are those of the start.

    widths: those that are trained, all below or at the stored one · weight_OI: where the latent weights begin.
    """

    def __init__(self, start: QWeight, grid: Grid, widths: Sequence[int], weight_OI: Tensor) -> None:
        super().__init__(start, "frozen", grid)
        self.trained = tuple(sorted(b for b in widths if b <= start.bits))
        self.register_buffer("start_OI", start.codes_OI.clone())
        self.pace = {b: PACE[b] for b in self.trained}
        self.latents = nn.ParameterDict({str(b): nn.Parameter(weight_OI / self.pace[b]) for b in self.trained})
        self.chain: list[Link] = []
        self.values: dict[int, Tensor] = {}

    @torch.no_grad()
    def links(self) -> list[Link]:
        """The codes of the trained widths, narrowest first, each inside the cell of the one before."""
        wanted = [self.position(self.latents[str(b)] * self.pace[b]) >> (self.bits - b) for b in self.trained]
        return linked(wanted, self.trained)

    def position(self, latent_OI: Tensor) -> Tensor:
        """The unbounded code of the stored width a latent weight is nearest to, int16."""
        flat_OI: Any = latent_OI.float()
        if self.column_scale_I is not None:
            flat_OI = flat_OI / self.column_scale_I
        spread = lambda x: expand_groups(x, flat_OI.shape[1], self.group_size)  # noqa: E731
        zero_OI = spread(self.zero * torch.ones_like(self.scale_OG))
        return round_half_up(flat_OI / spread(self.scale_OG) + zero_OI).clamp_(-(1 << 14), 1 << 14).to(torch.int16)

    def encode(self, weight_OI: Tensor | None = None) -> QWeight:
        """The stored weight: the trained bits, and below them the bits nearest to the start's code."""
        return self.joined(self.links())

    def joined(self, links: Sequence[Link]) -> QWeight:
        """The stored weight of these links."""
        shift = self.bits - self.trained[-1]
        low_OI = links[-1].code << shift
        start_OI: Any = self.start_OI
        codes_OI = torch.minimum(torch.maximum(start_OI.to(torch.int16), low_OI), low_OI + ((1 << shift) - 1))
        ratios = {width: getattr(self, f"ratio_{width}") for width in self.widths}
        column_scale_I: Any = self.column_scale_I
        return QWeight(
            codes_OI.to(torch.uint8), self.scale_OG, self.zero.float(), self.bits, self.group_size, ratios,
            column_scale_I,
        )  # fmt: skip

    @torch.no_grad()
    def settle(self, weight_OI: Tensor, stats: LayerStats | None, widths: Sequence[int]) -> None:
        """Choose the bits below the trained ones again, for the least output error at `widths` (lower_bits)."""
        wider = [b for b in widths if b > self.trained[-1]]
        if wider:
            q = lower_bits(weight_OI, stats, self.encode(), held=self.trained[-1], widths=wider)
            self.start_OI: Tensor = q.codes_OI
            self.forget()

    def forward(self, weight_OI: Tensor, width: int, key: object) -> Tensor:
        """The weight at `width` bits; the layer's own latent weight is not read."""
        versions = tuple(latent_OI._version for latent_OI in self.latents.values())
        now = (versions, Clock.steps)
        if self.kept_for != now:
            self.chain, self.kept_for, self.values = self.links(), now, {}
            self.stored = self.joined(self.chain)
        if width not in self.values:
            assert self.stored is not None
            self.values[width] = self.stored.dequantize(width)
        read = [b for b in self.trained if b <= width]
        latents_OI = [self.latents[str(b)] for b in read]
        return ThroughChain.apply(self.values[width], self.chain[: len(read)], *latents_OI)

    def forget(self) -> None:
        """Let kept weights go."""
        super().forget()
        self.chain, self.values = [], {}
