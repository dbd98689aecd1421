"""Fake quantization of one weight: forward as it will be stored, backward as if rounding were the identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from polybit.core.affine import Grid, QWeight, encode, expand_groups, split_groups, tops, zero_points
from polybit.quant.scales import settle, span_scale

Scales = Literal["learned", "frozen", "recomputed"]


class Clock:
    """Counts the steps of all optimizers of this process: a fused step leaves the version of a tensor as it was."""

    steps = 0

    @classmethod
    def tick(cls, *_: object) -> None:
        """One more step."""
        cls.steps += 1


register_optimizer_step_post_hook(Clock.tick)


class StraightThrough(torch.autograd.Function):
    """The stored value of a weight; its gradient passes to the weight where no code was clipped.

    With a scale s = s_0 (1 + g) the gradient of the growth g is LSQ's (arXiv 1902.08153, eq. 3) for a scale that moves
    codes and values: s_0/s (value - weight) inside the range and s_0/s value where clipped, summed over the group.
    """

    @staticmethod
    def forward(ctx: Any, weight_OI: Tensor, growth_OG: Tensor | None, seen: StoredValue) -> Tensor:
        """weight and growth are what is trained; `seen` is what they stand for now."""
        ctx.seen = seen
        ctx.save_for_backward(weight_OI)
        return seen.value_OI.view_as(seen.value_OI)

    @staticmethod
    def backward(ctx: Any, grad_OI: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of the weight and of the growth."""
        seen = ctx.seen
        (weight_OI,) = ctx.saved_tensors
        inside_OI = grad_OI if seen.within_OI is None else grad_OI * seen.within_OI
        if not ctx.needs_input_grad[1]:
            return inside_OI, None, None
        by_growth_OI = grad_OI * seen.value_OI - inside_OI * weight_OI
        summed_OG = split_groups(by_growth_OI, seen.group_size)[0].sum(-1)
        return inside_OI, summed_OG * seen.share_OG, None


@dataclass(frozen=True, slots=True)
class StoredValue:
    """A weight as it is stored now, read at one width.

    value_OI: what the layer multiplies with · within_OI: True where the code was not clipped, None when none was ·
    share_OG: s_0 / s of each group.
    """

    value_OI: Tensor
    within_OI: Tensor | None
    share_OG: Tensor
    group_size: int


class Code(nn.Module):
    """One grid of one weight: turns latent float weights into the values their stored codes have at a width.

    The scale comes from a start (an already quantized weight, so that training begins at its quality), and then is
    `frozen`, `learned` (a relative growth per group), or `recomputed` as the min-max range of the latent weights at
    every step, as LLM-QAT (arXiv 2305.17888) and CPT (arXiv 2101.09868) do; ratios are then 1. All of it is rounded
    as it is stored, inside the training step. Decoded weights are kept until what they were made from changes.
    """

    scale_OG: Tensor
    zero: Tensor

    def __init__(self, start: QWeight, scales: Scales, grid: Grid) -> None:
        super().__init__()
        self.bits, self.group_size, self.scales, self.grid = start.bits, start.group_size, scales, grid
        self.register_buffer("scale_OG", start.scale_OG.clone())
        self.register_buffer("zero", start.zero.clone())
        self.register_buffer("column_scale_I", start.column_scale_I)
        self.register_buffer("bits_G", start.bits_G if scales != "recomputed" else None)
        self.widths = tuple(start.ratios) if scales != "recomputed" else ()
        for width in self.widths:
            self.register_buffer(f"ratio_{width}", start.ratios[width].clone())
        self.growth_OG = nn.Parameter(torch.zeros_like(start.scale_OG)) if scales == "learned" else None
        self.grown_for: object = None
        self.growing: tuple[Tensor, Tensor] | None = None
        self.kept_for: object = None
        self.stored: QWeight | None = None
        self.within_OI: Tensor | None = None
        self.seen: dict[int, StoredValue] = {}

    def grown(self) -> tuple[Tensor, Tensor]:
        """(scale as it is stored, s_0 / s) of each group."""
        if self.growth_OG is None:
            return self.scale_OG, torch.ones_like(self.scale_OG)
        now = (self.growth_OG._version, Clock.steps)
        if self.growing is None or self.grown_for != now:
            scale_OG = settle(self.scale_OG * (1 + self.growth_OG.detach()))
            self.growing, self.grown_for = (scale_OG, self.scale_OG / scale_OG), now
        return self.growing

    @torch.no_grad()
    def encode(self, weight_OI: Tensor) -> QWeight:
        """The stored weight the latent weights stand for: the training forward and the file hold these same codes."""
        flat_OI = weight_OI.float()
        column_scale_I: Any = self.column_scale_I
        if self.scales == "recomputed":
            scale_OG, zero = span_scale(flat_OI, self.grid)
            fixed = self.grid.fixed_zero()
            zero = zero if fixed is None else zero.new_full((), fixed)
            column_scale_I = None
        else:
            scale_OG, zero = self.grown()[0], self.zero
        if column_scale_I is not None:
            flat_OI = flat_OI / column_scale_I
        bits_G: Any = self.bits_G
        codes_OI = encode(flat_OI, scale_OG, zero, self.bits, self.group_size, bits_G)
        ratios = {width: getattr(self, f"ratio_{width}") for width in self.widths}
        return QWeight(codes_OI, scale_OG, zero.float(), self.bits, self.group_size, ratios, column_scale_I, bits_G)

    @torch.no_grad()
    def inside(self, weight_OI: Tensor, q: QWeight) -> Tensor | None:
        """Where the latent weight lies in the range of the codes; None when everywhere."""
        flat_OI = weight_OI if q.column_scale_I is None else weight_OI / q.column_scale_I
        spread = lambda x: expand_groups(x, flat_OI.shape[1], q.group_size)  # noqa: E731
        zero = zero_points(q.zero, q.bits, q.bits_G)
        zero_OI = spread(zero * torch.ones_like(q.scale_OG)) if zero.ndim else zero
        top_OI = (1 << q.bits) - 1 if q.bits_G is None else spread(tops(q.bits_G)[None])
        position_OI = flat_OI / spread(q.scale_OG) + zero_OI
        within_OI = (position_OI >= -0.5) & (position_OI < top_OI + 0.5)
        # on a GPU the question would cost more than the multiplication it may save
        return None if within_OI.is_cpu and bool(within_OI.all()) else within_OI

    def forward(self, weight_OI: Tensor, width: int, key: object) -> Tensor:
        """The weight at `width` bits. `key` changes whenever the latent weight does (tensor versions)."""
        now = (key, None if self.growth_OG is None else self.growth_OG._version, Clock.steps)
        if self.kept_for != now:
            self.stored = self.encode(weight_OI)
            self.within_OI = None if self.scales == "recomputed" else self.inside(weight_OI, self.stored)
            self.seen, self.kept_for = {}, now
        if width not in self.seen:
            assert self.stored is not None
            share_OG = self.grown()[1]
            self.seen[width] = StoredValue(self.stored.dequantize(width), self.within_OI, share_OG, self.group_size)
        return StraightThrough.apply(weight_OI, self.growth_OG, self.seen[width])

    def _apply(self, *given: Any, **named: Any) -> Any:
        """Moving to another device or type leaves kept weights behind."""
        self.forget()
        return super()._apply(*given, **named)

    def forget(self) -> None:
        """Let kept weights go."""
        self.stored, self.within_OI, self.seen, self.kept_for = None, None, {}, None
        self.growing = None
