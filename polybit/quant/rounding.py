"""Learned rounding: codes and scales trained by gradient so that a block, or a model, gives what it gave in float.

Every weight has a latent position in units of codes. Forward, it is rounded as it will be stored; backward, the
rounding counts as identity. Latents start inside the cells of a good start (GPTQ): training only moves what pays.
Suffixes: N groups of all weights together, L columns of a group; O, I, G as in core.affine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from polybit.core.affine import Grid, QWeight, scale_gain, split_groups, tops, zero_points
from polybit.core.records import LayerStats
from polybit.core.runtime import Advance, PolybitError
from polybit.quant.gptq import gptq
from polybit.quant.problem import pose
from polybit.quant.scales import settle
from polybit.quant.steps import KeptState, descend, untold

Loss = Callable[[Mapping[str, Tensor], int], Tensor]  # (weights [O, I] by name, batch index) -> scalar
Objective = Callable[[Mapping[str, Tensor], int], Tensor]  # (weights [O, I] by name, step) -> scalar
COMPARED = 16  # batches on which the start and the result of training are compared
LAST = 10  # gradient steps which that comparison takes as long as
INSIDE = 0.499  # how far from the middle of its cell a latent may start, in codes


@dataclass(frozen=True, slots=True)
class Tuning:
    """Knobs of learned rounding.

    steps: gradient steps, one batch each · lr: step of the latents, in codes · scale_lr: relative step of the scales
    (0 keeps them) · inside: how far from the middle of its cell a latent may start, in codes · warmup: share of the
    steps in which the rate rises · seed: order of the batches.
    """

    steps: int = 200
    lr: float = 0.005
    scale_lr: float = 0.002
    inside: float = INSIDE
    warmup: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.lr < 0 or self.scale_lr < 0:
            raise PolybitError(
                f"learned rounding got steps={self.steps}, lr={self.lr}, scale_lr={self.scale_lr}: "
                "all must be zero or more"
            )

    def rate(self, step: int) -> float:
        """Share of the learning rate at a step: a short rise, then a cosine down to zero."""
        rise = max(1.0, self.warmup * self.steps)
        return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * (step + 0.5) / self.steps))


class RoundThrough(torch.autograd.Function):
    """Weights as stored, s * (u - z); the gradient treats the rounding as identity in range.

    LSQ (arXiv 1902.08153) eq. 1-5, but for latents in units of codes: moving a scale moves values, not codes.
    """

    @staticmethod
    def forward(ctx, latent_NL, scale_N1, zero_N1, top_N1):
        """zero point z; top 2^B - 1."""
        code_NL = torch.floor(latent_NL + 0.5)
        within_NL = (code_NL >= 0) & (code_NL <= top_N1)
        torch.minimum(code_NL.clamp_(min=0), top_N1, out=code_NL)
        step_NL = code_NL.sub_(zero_N1)
        ctx.save_for_backward(step_NL, scale_N1, within_NL)
        return scale_N1 * step_NL

    @staticmethod
    def backward(ctx, grad_NL):
        """Gradients of the latents and the scale."""
        step_NL, scale_N1, within_NL = ctx.saved_tensors
        return grad_NL * scale_N1 * within_NL, (grad_NL * step_NL).sum(1, keepdim=True), None, None


class Bank:
    """The groups of equal length of several weights, trained as one tensor."""

    def __init__(self, start: Mapping[str, QWeight], weights: Mapping[str, Tensor], inside: float = INSIDE) -> None:
        self.start = dict(start)
        self.slices: dict[str, slice] = {}
        latents, scales, gains, zeros, tops_of = [], [], [], [], []
        first = 0
        for name, q in self.start.items():
            groups_OGL, _ = split_groups(start_latents(q, weights[name], inside), q.group_size)
            count = groups_OGL.shape[0] * groups_OGL.shape[1]
            self.slices[name] = slice(first, first + count)
            first += count
            column = torch.ones(count, 1, device=q.scale_OG.device)
            latents.append(groups_OGL.reshape(count, -1))
            scales.append(q.scale_OG.reshape(count, 1))
            gains.append(column * scale_gain(q.scale_OG))
            zero = zero_points(q.zero, q.bits, q.bits_G)
            zeros.append((zero * torch.ones_like(q.scale_OG)).reshape(count, 1))
            tops_of.append(tops(q.stored_widths()).to(q.scale_OG).expand_as(q.scale_OG).reshape(count, 1))
        self.latent_NL = torch.cat(latents).contiguous().requires_grad_()
        self.start_scale_N1, self.gain_N1 = torch.cat(scales), torch.cat(gains)
        self.growth_N1 = torch.zeros_like(self.start_scale_N1, requires_grad=True)
        self.zero_N1, self.top_N1 = torch.cat(zeros), torch.cat(tops_of)

    def scale_N1(self) -> Tensor:
        """Scales now, as 16-bit floats; the rounding is straight through."""
        scale = self.start_scale_N1 * (1 + self.growth_N1)
        stored = (scale.detach() / self.gain_N1).half()
        stored = torch.where(stored == 0, torch.full_like(stored, 2.0**-24), stored).float() * self.gain_N1
        return scale + (stored - scale).detach()

    def values(self) -> dict[str, Tensor]:
        """The weights [O, I] as they would be stored now."""
        flat_NL = RoundThrough.apply(self.latent_NL, self.scale_N1(), self.zero_N1, self.top_N1)
        # split, not sliced: the gradient of a slice is as large as the bank, one for every weight
        parts = flat_NL.split([here.stop - here.start for here in self.slices.values()])
        return {name: self.matrix(part_NL, name) for name, part_NL in zip(self.slices, parts, strict=True)}

    def matrix(self, part_NL: Tensor, name: str) -> Tensor:
        """The weight [O, I] whose groups these are."""
        q = self.start[name]
        weight_OI = part_NL.reshape(q.shape[0], -1)[:, : q.shape[1]]
        return weight_OI if q.column_scale_I is None else weight_OI * q.column_scale_I

    @torch.no_grad()
    def confine(self) -> None:
        """Keep latents where their gradient still reaches them."""
        torch.minimum(self.latent_NL.clamp_(min=-INSIDE), self.top_N1 + INSIDE, out=self.latent_NL)

    @torch.no_grad()
    def harden(self) -> dict[str, QWeight]:
        """Codes and scales as stored."""
        codes_NL = torch.minimum(torch.floor(self.latent_NL + 0.5).clamp_(min=0), self.top_N1)
        scale_N1 = self.scale_N1()
        found = {}
        for name, q in self.start.items():
            here = self.slices[name]
            codes_OI = codes_NL[here].reshape(q.shape[0], -1)[:, : q.shape[1]].to(torch.uint8).contiguous()
            scale_OG = settle(scale_N1[here].reshape(q.scale_OG.shape))
            found[name] = replace(q, codes_OI=codes_OI, scale_OG=scale_OG)
        return found


def start_latents(q: QWeight, weight_OI: Tensor, inside: float = INSIDE) -> Tensor:
    """Where the float weight lies in units of codes, moved into the cell of its start code, float32 [O, I].

    A weight just across a boundary from its code is thus quick to change its mind, one in the middle slow. inside: at
    most so far from the middle; near 0.5, the first noisy steps undo what error compensation had decided.
    """
    if q.column_scale_I is not None:
        weight_OI = weight_OI / q.column_scale_I
    weight_OGL, _ = split_groups(weight_OI.float(), q.group_size)
    zero = (zero_points(q.zero, q.bits, q.bits_G) * torch.ones_like(q.scale_OG))[..., None]
    position_OI = (weight_OGL / q.scale_OG[..., None] + zero).flatten(1)[:, : q.shape[1]]
    codes_OI = q.codes_OI.float()
    return torch.minimum(torch.maximum(position_OI, codes_OI - inside), codes_OI + inside)


def refine(
    start: Mapping[str, QWeight],
    weights: Mapping[str, Tensor],
    loss: Loss,
    batches: int,
    *,
    tuning: Tuning | None = None,
    score: Loss | None = None,
    kept: KeptState | None = None,
    told: Advance = untold,
) -> dict[str, QWeight]:
    """Train the codes and scales of one or many weights together against any loss; never worse than the start.

    start: quantized weights to begin from, widths and group sizes may differ · weights: the float weights [O, I] ·
    loss(weights, i): a scalar for batch i of `batches`, a mean over its tokens, differentiable in the weights.
    Follows AutoRound (arXiv 2309.05516): rounding and scale are learned together over a few hundred steps. Unlike the
    paper, training starts from error-compensated codes instead of nearest ones, a latent may cross more than one code,
    and Adam takes the place of signed descent. Whatever has the lower mean `score` (default: the loss) over up to
    COMPARED batches, the trained weights or the start, is returned, so that a bad rate cannot do harm. The same seed
    gives the same bits. kept: where the state lies between two runs of the same · told: hears of each step, and
    of the comparison as LAST more.
    """
    tuning = tuning or Tuning()
    order = batch_order(batches, tuning)
    objective: Objective = lambda weights, step: loss(weights, order[step])  # noqa: E731
    trained = train(start, weights, objective, tuning, kept=kept, told=told)
    score = score or loss
    each = partial(told, LAST / (2 * len(compared(batches))))
    better = trained is not start and mean_loss(trained, score, batches, each) < mean_loss(start, score, batches, each)
    return dict(trained if better else start)


def train(
    start: Mapping[str, QWeight],
    weights: Mapping[str, Tensor],
    objective: Objective,
    tuning: Tuning,
    *,
    kept: KeptState | None = None,
    told: Advance = untold,
) -> Mapping[str, QWeight]:
    """The gradient steps of `refine` without its comparison.

    objective(weights, step): a scalar · kept, told: as in `refine`
    """
    if not start or not tuning.steps:
        return start
    banks = make_banks(start, weights, tuning.inside)

    def loss(step: int) -> Tensor:
        return objective({name: weight for bank in banks for name, weight in bank.values().items()}, step)

    def confine() -> None:
        for bank in banks:
            bank.confine()

    groups = [
        ([bank.latent_NL for bank in banks], tuning.lr),
        ([bank.growth_N1 for bank in banks], tuning.scale_lr),
    ]
    descend(groups, tuning.steps, loss, share=tuning.rate, after=confine, kept=kept, told=told)
    trained = {name: q for bank in banks for name, q in bank.harden().items()}
    return {name: trained[name] for name in start}


def make_banks(start: Mapping[str, QWeight], weights: Mapping[str, Tensor], inside: float = INSIDE) -> list[Bank]:
    """One bank per length of group."""
    lengths = {name: q.group_size or q.shape[1] for name, q in start.items()}
    return [
        Bank({name: start[name] for name in start if lengths[name] == length}, weights, inside)
        for length in sorted(set(lengths.values()))
    ]


def batch_order(batches: int, tuning: Tuning) -> list[int]:
    """Which batch each step takes: all of them once in random order, then again."""
    generator = torch.Generator().manual_seed(tuning.seed)
    rounds = [torch.randperm(batches, generator=generator) for _ in range(-(-tuning.steps // batches) or 1)]
    return torch.cat(rounds)[: tuning.steps].tolist()


@torch.no_grad()
def mean_loss(weights: Mapping[str, QWeight], loss: Loss, batches: int, each: Callable[[], None]) -> float:
    """The loss of quantized weights, mean over up to COMPARED batches; `each` is called after every one."""
    dense = {name: q.dequantize() for name, q in weights.items()}
    total, chosen = 0.0, compared(batches)
    for index in chosen:
        total += float(loss(dense, index))
        each()
    return total / len(chosen) if math.isfinite(total) else math.inf


def compared(batches: int) -> range:
    """The batches on which start and result are compared."""
    return range(0, batches, -(-batches // COMPARED))


def rounding(
    weight_OI: Tensor, stats: LayerStats | None, grid: Grid, *, damp: float = 0.01, tuning: Tuning | None = None
) -> QWeight:
    """Learned rounding of one layer by itself: least output error tr(E H Eᵀ), from GPTQ's codes.

    The form of the table of quantizers. A block or the whole model as objective (`refine`) does far better.
    """
    start = gptq(weight_OI, stats, grid, damp=damp)
    problem = pose(weight_OI, stats, damp=damp)
    target_OI, hessian_II = weight_OI.float(), problem.hessian_II.float()
    level = float(torch.einsum("oi,ij,oj->", target_OI, hessian_II, target_OI)) or 1.0

    def loss(weights: Mapping[str, Tensor], _: int) -> Tensor:
        error_OI = weights["weight"] - target_OI
        return ((error_OI @ hessian_II) * error_OI).sum() / level

    return refine({"weight": start}, {"weight": weight_OI}, loss, 1, tuning=tuning)["weight"]
