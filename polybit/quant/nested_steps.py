"""Learned rounding of nested codes: a latent weight per narrow width, trained by gradient, in the chain of one code.

The steps are those of `rounding`; what differs is what a step may change. Width b reads its codes from latent weights
of its own, each code inside the cell of the next narrower width (chain.py). A narrow code outside its weight's own cell
is what wide widths pay for, which cannot come back: so it may only go to cells that lie within REACH of the weight. The
bits behind the widest trained width are chosen afterwards, for the least output error of each layer (lower_bits).

A weight of 0.3 codes above the border between two cells of 2 bits may change sides, one of 30 may not:

    >>> q = QWeight(torch.tensor([[64, 94]]), torch.tensor([[1.0]]), torch.tensor([[128.0]]), 8, 0, {2: torch.ones(())})
    >>> bank = NestedBank({"a": q}, {"a": torch.tensor([[-64.2, -34.2]])}, (2,), inside=0.45)
    >>> bank.values(2)["a"].tolist()
    [[-32.5, -32.5]]
    >>> _ = bank.latents[2].data.sub_(1)
    >>> bank.confine()
    >>> bank.values(2)["a"].tolist()
    [[-96.5, -32.5]]

Suffixes: N groups of all weights together, L columns of a group; O, I, G as in core.affine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from polybit.core.affine import QWeight, centre, split_groups, zero_points
from polybit.core.runtime import Advance
from polybit.quant.chain import Link, linked, shares
from polybit.quant.rounding import Tuning
from polybit.quant.steps import KeptState, descend, untold

Values = Callable[[int], Mapping[str, Tensor]]  # width -> weights [O, I] by name
Objective = Callable[[Values, int], Tensor]  # (values, step) -> scalar
REACH = 3 / 256  # of all codes: how far from its weight a cell may lie that a narrow code may take; 8 bits pay for it
WITHIN = 1e-3  # latent weights stay so far inside the last cell they may reach


class ThroughNested(torch.autograd.Function):
    """Weights as stored at one width, s * (2^(B-b) r_b (p_b - c_b) + c_B - z), from the latent weights of a chain.

    The rounding is straight through, and the gradient shared along the chain (chain.shares). It is in units of values
    for every latent weight: Adam makes steps of one size of it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scale_N1: Tensor,
        step_N1: Tensor,
        offset_N1: Tensor,
        middle: float,
        links: Sequence[Link],
        *latents_NL: Tensor,
    ) -> Tensor:
        """step 2^(B-b) r; offset c_B - z; middle c_b; links, latents: from the narrowest width to the one read."""
        ctx.links = links
        return (links[-1].code - middle).mul_(step_N1).add_(offset_N1).mul_(scale_N1)

    @staticmethod
    def backward(ctx: Any, grad_NL: Tensor) -> tuple[Tensor | None, ...]:
        """Of the latent weights."""
        return None, None, None, None, None, *shares(ctx.links, grad_NL)


class NestedBank:
    """The groups of equal length of several nested weights of one stored width, trained as one tensor per width.

    trained: the widths with latent weights, narrowest first · inside: how far from the middle of its start's cell a
    latent weight may start. Latent weights are in codes of their own width: code p is what lies in p to p + 1.
    """

    def __init__(
        self, start: Mapping[str, QWeight], weights: Mapping[str, Tensor], trained: Sequence[int], inside: float
    ) -> None:
        self.start, self.trained = dict(start), tuple(sorted(trained))
        self.bits = next(iter(start.values())).bits
        self.counts = [q.scale_OG.numel() for q in self.start.values()]
        rows = lambda of: torch.cat([of(name, q).reshape(q.scale_OG.numel(), -1) for name, q in start.items()])  # noqa: E731
        self.scale_N1 = rows(lambda _, q: q.scale_OG)
        zero_N1 = rows(lambda _, q: zero_points(q.zero, q.bits, None) * torch.ones_like(q.scale_OG))
        self.offset_N1 = centre(self.bits) - zero_N1
        self.code_NL = rows(lambda _, q: split_groups(q.codes_OI, q.group_size)[0])
        ones = torch.ones(())
        self.step = {
            b: rows(lambda _, q, b=b: q.ratios.get(b, ones) * torch.ones_like(q.scale_OG)) * 2 ** (self.bits - b)
            for b in self.trained
        }
        self.latents: dict[int, Tensor] = {}
        self.bounds: dict[int, tuple[Tensor, Tensor]] = {}  # of codes, uint8
        self.confined: dict[int, int] = {}
        self.weights = {name: weights[name] for name in self.start}
        place_NL = self.place()
        for b in self.trained:
            self.begin(b, place_NL, inside)
        self.bound(REACH)

    def place(self) -> Tensor:
        """Where the float weights lie, from c_B, in stored codes, [N, L]."""
        parts = [split_groups(self.weights[name].float(), q.group_size)[0] for name, q in self.start.items()]
        flat_NL = torch.cat([part_OGL.flatten(0, 1) for part_OGL in parts])
        return flat_NL.div_(self.scale_N1).sub_(self.offset_N1)

    def begin(self, b: int, place_NL: Tensor, inside: float) -> None:
        """The latent weights of a width, inside the cells of the start; with inside < 0.5 none is below 0."""
        at_NL = place_NL / self.step[b] + (centre(b) + 0.5)
        middle_NL = (self.code_NL >> (self.bits - b)).float().add_(0.5)
        at_NL = torch.minimum(torch.maximum(at_NL, middle_NL - inside), middle_NL + inside)
        self.latents[b] = at_NL.requires_grad_()

    def bound(self, reach: float) -> None:
        """The codes that latent weights may take: their weight's own, that of the start, and those within reach."""
        place_NL = self.place()
        for b in self.trained:
            at_NL = place_NL / self.step[b] + (centre(b) + 0.5)
            own_NL, far, top = (self.code_NL >> (self.bits - b)).float(), reach * 2**b, float(2**b - 1)
            low_NL = torch.minimum((at_NL - far).floor_(), own_NL).clamp_(0, top)
            high_NL = torch.maximum((at_NL + far).floor_(), own_NL).clamp_(0, top)
            self.bounds[b] = low_NL.to(torch.uint8), high_NL.to(torch.uint8)
        self.confined.clear()

    def links(self, width: int) -> list[Link]:
        """The chain from the narrowest trained width to this one."""
        read = [b for b in self.trained if b <= width]
        return linked([self.latents[b].detach().to(torch.uint8) for b in read], read)  # none is below 0

    def values(self, width: int) -> dict[str, Tensor]:
        """The weights [O, I] as they would be stored now, read at a trained width."""
        links, latents = self.links(width), [self.latents[b] for b in self.trained if b <= width]
        flat_NL = ThroughNested.apply(
            self.scale_N1, self.step[width], self.offset_N1, centre(width), links, *latents
        )  # fmt: skip
        # split, not sliced: the gradient of a slice is as large as the bank, one for every weight
        return {
            name: self.matrix(part, name) for name, part in zip(self.start, flat_NL.split(self.counts), strict=True)
        }

    def matrix(self, part_NL: Tensor, name: str) -> Tensor:
        """The matrix [O, I] whose groups these are."""
        rows, columns = self.start[name].shape
        return part_NL.reshape(rows, -1)[:, :columns]

    @torch.no_grad()
    def confine(self) -> None:
        """Keep latent weights among the cells they may reach."""
        for b, latent_NL in self.latents.items():
            if self.confined.get(b) != latent_NL._version:
                low_NL, high_NL = self.bounds[b]
                torch.maximum(latent_NL, low_NL.float(), out=latent_NL)
                torch.minimum(latent_NL, high_NL.float().add_(1 - WITHIN), out=latent_NL)
                self.confined[b] = latent_NL._version

    @torch.no_grad()
    def harden(self) -> dict[str, QWeight]:
        """Codes as stored; behind the trained widths the bits nearest to the start's."""
        shift = self.bits - self.trained[-1]
        low_NL = self.links(self.trained[-1])[-1].code << shift
        codes_NL = torch.minimum(torch.maximum(self.code_NL, low_NL), low_NL + ((1 << shift) - 1))
        return {
            name: replace(self.start[name], codes_OI=self.matrix(part_NL, name).contiguous())
            for name, part_NL in zip(self.start, codes_NL.split(self.counts), strict=True)
        }


def train_nested(
    start: Mapping[str, QWeight],
    weights: Mapping[str, Tensor],
    objective: Objective,
    widths: Sequence[int],
    tuning: Tuning,
    *,
    kept: KeptState | None = None,
    told: Advance = untold,
) -> Callable[[float], dict[str, QWeight]]:
    """Nested codes after gradient steps at some of their widths; all but codes is the start's.

    Returns them as a function of a reach up to REACH: with a smaller one, what left it stays at its border.

    start: nested weights [O, I] with one width for all their groups and no column scale · weights: the float ones ·
    objective(values, step): a scalar; values(b) are the weights seen at b bits · widths: those it reads · kept, told:
    as in rounding.refine
    """
    banks = make_banks(start, weights, widths, tuning.inside)
    values: Values = lambda width: {n: w for bank in banks for n, w in bank.values(width).items()}  # noqa: E731

    def confine() -> None:
        for bank in banks:
            bank.confine()

    groups = [([bank.latents[b] for bank in banks for b in bank.trained], tuning.lr)]
    loss = partial(objective, values)
    descend(groups, tuning.steps, loss, share=tuning.rate, after=confine, kept=kept, told=told)

    def within(reach: float) -> dict[str, QWeight]:
        for bank in banks:
            bank.bound(reach)
            bank.confine()
        trained = {name: q for bank in banks for name, q in bank.harden().items()}
        return {name: trained[name] for name in start}

    return within


def make_banks(
    start: Mapping[str, QWeight], weights: Mapping[str, Tensor], widths: Sequence[int], inside: float
) -> list[NestedBank]:
    """One bank per length of group and stored width."""
    kinds = {name: (q.group_size or q.shape[1], q.bits) for name, q in start.items()}
    return [
        NestedBank({name: start[name] for name in start if kinds[name] == kind}, weights, widths, inside)
        for kind in sorted(set(kinds.values()))
    ]
