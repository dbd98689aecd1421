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
from polybit.core.planes import storable_ratio
from polybit.core.records import LayerStats
from polybit.core.runtime import Advance, PolybitError
from polybit.quant.gptq import gptq
from polybit.quant.problem import pose
from polybit.quant.scales import settle
from polybit.quant.steps import KeptState, descend, untold

Loss = Callable[[Mapping[str, Tensor], int], Tensor]  # (weights [O, I] by name, batch index) -> scalar
Values = Callable[[int | None], Mapping[str, Tensor]]  # width -> weights [O, I] by name
Objective = Callable[[Values, int], Tensor]  # (values, step) -> scalar
COMPARED = 16  # batches on which the start and the result of training are compared
LAST = 10  # gradient steps which that comparison takes as long as
INSIDE = 0.499  # how far from the middle of its cell a latent may start, in codes


@dataclass(frozen=True, slots=True)
class Tuning:
    """Knobs of learned rounding.

    steps: gradient steps, one batch each · lr: step of the latents, in codes · scale_lr: relative step of the scales
    (0 keeps them) · ratio_lr: the same for the ratios of narrower widths · reach: see RoundThrough, in codes ·
    inside: how far from the middle of its cell a latent may start, in codes · warmup: share of the steps in which the
    rate rises · seed: order of the batches.
    """

    steps: int = 200
    lr: float = 0.005
    scale_lr: float = 0.002
    ratio_lr: float = 0.001
    reach: float = 0.0
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
    """Weights as stored: s * (2^(B-b) r (p - c_b) + c_B - z); the gradient treats the rounding as identity in range.

    LSQ (arXiv 1902.08153) eq. 1-5, but for latents in units of codes: moving a scale moves values, not codes. At a
    narrower width b a cell spans 2^(B-b) codes, and moving inside it would change nothing at b and spoil the wider
    widths; with `reach` > 0 the gradient at b fades out `reach` codes from the boundary it points at.
    """

    @staticmethod
    def forward(ctx, latent_NL, scale_N1, ratio_N1, stride_N1, offset_N1, top_N1, reach):
        """ratio r; stride 2^(B-b); offset c_B - z; top 2^B - 1; reach in codes of B bits."""
        prefix_NL = torch.floor(latent_NL + 0.5)
        within_NL = (prefix_NL >= 0) & (prefix_NL <= top_N1)
        torch.minimum(prefix_NL.clamp_(min=0), top_N1, out=prefix_NL)
        ctx.inner_NL, ctx.reach = None, reach
        if float(stride_N1.max()) > 1:
            prefix_NL.div_(stride_N1).floor_()
            ctx.inner_NL = latent_NL + 0.5 - stride_N1 * prefix_NL  # place in the cell, 0 to stride
        prefix_NL.sub_(((top_N1 + 1) / stride_N1 - 1) / 2)
        step_N1 = ratio_N1 * stride_N1
        ctx.save_for_backward(prefix_NL, scale_N1, ratio_N1, step_N1, stride_N1, offset_N1, within_NL)
        return scale_N1 * (step_N1 * prefix_NL + offset_N1)

    @staticmethod
    def backward(ctx, grad_NL):
        """Gradients of the latents, the scale and the ratio."""
        prefix_NL, scale_N1, ratio_N1, step_N1, stride_N1, offset_N1, within_NL = ctx.saved_tensors
        along_N1 = (grad_NL * prefix_NL).sum(1, keepdim=True)
        by_scale_N1 = along_N1 * step_N1 + grad_NL.sum(1, keepdim=True) * offset_N1
        by_ratio_N1 = along_N1 * scale_N1 * stride_N1 if ctx.needs_input_grad[2] else None
        by_latent_NL = grad_NL * (scale_N1 * ratio_N1) * within_NL
        if ctx.inner_NL is not None and ctx.reach:
            # descent lowers a latent whose gradient is positive: towards the lower end of its cell
            way_NL = torch.where(grad_NL > 0, ctx.inner_NL, stride_N1 - ctx.inner_NL)
            by_latent_NL *= ((1 + 1 / ctx.reach) - way_NL / ctx.reach).clamp_(0, 1)
        return by_latent_NL, by_scale_N1, by_ratio_N1, None, None, None, None


class Bank:
    """The groups of equal length of several weights, trained as one tensor."""

    def __init__(self, start: Mapping[str, QWeight], weights: Mapping[str, Tensor], inside: float = INSIDE) -> None:
        self.start = dict(start)
        self.slices: dict[str, slice] = {}
        latents, scales, gains, offsets, bits = [], [], [], [], []
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
            stored_G = q.stored_widths()
            zero = zero_points(q.zero, q.bits, q.bits_G)
            offsets.append((tops(stored_G) / 2 - zero * torch.ones_like(q.scale_OG)).reshape(count, 1))
            bits.append(stored_G.float().expand_as(q.scale_OG).reshape(count, 1))
        self.latent_NL = torch.cat(latents).contiguous().requires_grad_()
        self.start_scale_N1, self.gain_N1 = torch.cat(scales), torch.cat(gains)
        self.growth_N1 = torch.zeros_like(self.start_scale_N1, requires_grad=True)
        self.offset_N1, self.bits_N1 = torch.cat(offsets), torch.cat(bits)
        self.top_N1 = 2**self.bits_N1 - 1
        counts = torch.tensor([here.stop - here.start for here in self.slices.values()])
        self.layer_N = torch.arange(len(counts)).repeat_interleave(counts).to(self.latent_NL.device)
        # one growth per layer and narrower width: a whole table of ratios grows together and stays storable
        self.ratio_growth = {
            width: torch.zeros(len(counts), device=self.latent_NL.device, requires_grad=True)
            for width in sorted({b for q in self.start.values() for b in q.ratios})
        }

    def scale_N1(self) -> Tensor:
        """Scales now, as 16-bit floats; the rounding is straight through."""
        scale = self.start_scale_N1 * (1 + self.growth_N1)
        stored = (scale.detach() / self.gain_N1).half()
        stored = torch.where(stored == 0, torch.full_like(stored, 2.0**-24), stored).float() * self.gain_N1
        return scale + (stored - scale).detach()

    def ratio_N1(self, width: int | None) -> Tensor:
        """Ratios of a width now; ones where a weight has none."""
        if width not in self.ratio_growth:
            return torch.ones_like(self.start_scale_N1)
        rows = []
        for q in self.start.values():
            ratio = q.ratios.get(width, torch.ones(())).to(q.scale_OG)
            rows.append((ratio * torch.ones_like(q.scale_OG)).reshape(-1, 1))
        return torch.cat(rows) * (1 + self.ratio_growth[width][self.layer_N, None])

    def values(self, width: int | None = None, reach: float = 0.0) -> dict[str, Tensor]:
        """The weights [O, I] as they would be stored now, seen at `width` bits (None: all bits of each)."""
        narrowed_N1 = self.bits_N1 if width is None else self.bits_N1.clamp(max=width)
        stride_N1 = 2 ** (self.bits_N1 - narrowed_N1)
        flat_NL = RoundThrough.apply(
            self.latent_NL, self.scale_N1(), self.ratio_N1(width), stride_N1, self.offset_N1, self.top_N1, reach
        )
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
        """Codes, scales and ratios as stored."""
        codes_NL = torch.minimum(torch.floor(self.latent_NL + 0.5).clamp_(min=0), self.top_N1)
        scale_N1 = self.scale_N1()
        found = {}
        for layer, (name, q) in enumerate(self.start.items()):
            here = self.slices[name]
            codes_OI = codes_NL[here].reshape(q.shape[0], -1)[:, : q.shape[1]].to(torch.uint8).contiguous()
            scale_OG = settle(scale_N1[here].reshape(q.scale_OG.shape))
            ratios = {b: storable_ratio(r * (1 + self.ratio_growth[b][layer])) for b, r in q.ratios.items()}
            found[name] = replace(q, codes_OI=codes_OI, scale_OG=scale_OG, ratios=ratios)
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
    objective: Objective = lambda values, step: loss(values(None), order[step])  # noqa: E731
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
    """The gradient steps of `refine` without its comparison, for objectives that read several widths of one code.

    objective(values, step): a scalar; values(b) are the weights seen at b bits, values(None) at all stored bits ·
    kept, told: as in `refine`
    """
    if not start or not tuning.steps:
        return start
    banks = make_banks(start, weights, tuning.inside)

    def values(width: int | None) -> dict[str, Tensor]:
        return {name: weight for bank in banks for name, weight in bank.values(width, tuning.reach).items()}

    def confine() -> None:
        for bank in banks:
            bank.confine()

    groups = [
        ([bank.latent_NL for bank in banks], tuning.lr),
        ([bank.growth_N1 for bank in banks], tuning.scale_lr),
        ([g for bank in banks for g in bank.ratio_growth.values()], tuning.ratio_lr),
    ]
    loss = partial(objective, values)
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
