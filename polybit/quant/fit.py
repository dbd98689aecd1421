"""Least-squares scale, zero point and ratios of one group with its codes fixed, under H, rounded to what is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from polybit.core.affine import round_half_up
from polybit.quant.levels import Levels
from polybit.quant.scales import half_scale


@dataclass(frozen=True, slots=True)
class FitFreedom:
    """What a refit may change: always the scale (16-bit floats times `gain`), the zero point if `zero`, and for the
    widths in `tables` the ratio, which must be one of the values of its table."""

    gain: float
    zero: bool = False
    tables: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Quadratic:
    """Σ_b λ_b tr(E_b H E_bᵀ) of each row as a function of one group's s, o = c_B - z and r_b, up to a constant:
    Σ_b λ_b [ s² (r² a + 2 r o c + o² d) - 2 s (r p + o q) ], everything [B, O] except d."""

    emphasis_B1: Tensor
    a_BO: Tensor
    c_BO: Tensor
    d: Tensor
    p_BO: Tensor
    q_BO: Tensor

    def total(self, x_BO: Tensor) -> Tensor:
        """Σ_b λ_b x_b, per row."""
        return (self.emphasis_B1 * x_BO).sum(0)

    def cost(self, s_O: Tensor, o_O: Tensor, r_BO: Tensor) -> Tensor:
        """The function itself, per row."""
        square = r_BO.square() * self.a_BO + 2 * r_BO * o_O * self.c_BO + o_O.square() * self.d
        return self.total(s_O.square() * square - 2 * s_O * (r_BO * self.p_BO + o_O * self.q_BO))

    def scale(self, o_O: Tensor, r_BO: Tensor, otherwise_O: Tensor) -> Tensor:
        """Best scale; `otherwise` where every value is 0 whatever the scale."""
        square = r_BO.square() * self.a_BO + 2 * r_BO * o_O * self.c_BO + o_O.square() * self.d
        best = self.total(r_BO * self.p_BO + o_O * self.q_BO) / self.total(square)
        return torch.where(torch.isfinite(best) & (best != 0), best, otherwise_O)

    def offset(self, r_BO: Tensor) -> Tensor:
        """Best o when the scale is free too, before rounding; NaN where the two cannot be told apart."""
        vv, v1 = self.total(r_BO.square() * self.a_BO), self.total(r_BO * self.c_BO)
        one = self.d * self.emphasis_B1.sum()
        wv, w1 = self.total(r_BO * self.p_BO), self.total(self.q_BO)
        return (vv * w1 - v1 * wv) / (one * wv - v1 * w1)

    def ratio(self, s_O: Tensor, o_O: Tensor) -> Tensor:
        """Best ratio of every width for itself, [B, O]."""
        return (self.p_BO / s_O - o_O * self.c_BO) / self.a_BO


def expand_around(levels: Levels, group: int, codes_Oi: Tensor, gradient_BOi: Tensor, hessian_ii: Tensor) -> Quadratic:
    """The cost as a function of one group's numbers; gradient_BOi is (E_b H) at the group's columns."""
    prefix_BOi = levels.prefixes(codes_Oi, group) * levels.strides()
    pushed_BOi = prefix_BOi @ hessian_ii
    ones_i = hessian_ii.sum(0)
    s_O1 = levels.scale_OG[:, group, None]
    o_O1 = levels.middle(group) - levels.zero_OG[:, group, None]
    wanted_BOi = s_O1 * (levels.ratio_BOG[:, :, group, None] * pushed_BOi + o_O1 * ones_i) - gradient_BOi
    return Quadratic(
        levels.emphasis_B[:, None],
        (prefix_BOi * pushed_BOi).sum(-1),
        pushed_BOi.sum(-1),
        ones_i.sum(),
        (prefix_BOi * wanted_BOi).sum(-1),
        wanted_BOi.sum(-1),
    )


def fit_group(
    levels: Levels, group: int, codes_Oi: Tensor, gradient_BOi: Tensor, hessian_ii: Tensor, freedom: FitFreedom
) -> None:
    """Give one group of every row, in place, the best storable scale (zero point, ratios) for its codes.

    The present values are among the candidates, so the cost cannot rise.
    """
    quadratic = expand_around(levels, group, codes_Oi, gradient_BOi, hessian_ii)
    best = (
        levels.scale_OG[:, group].clone(),
        levels.middle(group) - levels.zero_OG[:, group],
        levels.ratio_BOG[:, :, group].clone(),
    )
    least_O = quadratic.cost(*best)
    for proposal in proposals(quadratic, best, levels, group, freedom):
        cost_O = quadratic.cost(*proposal)
        better_O = cost_O < least_O
        least_O = torch.where(better_O, cost_O, least_O)
        best = tuple(torch.where(better_O, new, old) for new, old in zip(proposal, best, strict=True))  # type: ignore[assignment]
    levels.scale_OG[:, group] = best[0]
    levels.zero_OG[:, group] = levels.middle(group) - best[1]
    levels.ratio_BOG[:, :, group] = best[2]


def proposals(
    quadratic: Quadratic, now: tuple[Tensor, Tensor, Tensor], levels: Levels, group: int, freedom: FitFreedom
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Storable (s, o, r) worth trying: around the joint least-squares optimum, ratios and scale fitted in turn."""
    s_O, o_O, r_BO = now
    offsets = [o_O]
    if freedom.zero:
        middle, top = levels.middle(group), levels.top(group)
        wanted_O = quadratic.offset(r_BO)
        nearest_O = round_half_up(middle - torch.where(torch.isfinite(wanted_O), wanted_O, o_O)).clamp(0, top)
        offsets += [middle - (nearest_O + shift).clamp(0, top) for shift in (0, -1, 1)]
    for offset_O in offsets:
        ratio_BO = r_BO
        scale_O = half_scale(quadratic.scale(offset_O, ratio_BO, s_O), freedom.gain)
        yield scale_O, offset_O, ratio_BO
        for _ in range(2 if freedom.tables else 0):
            ratio_BO = nearest_ratios(quadratic.ratio(scale_O, offset_O), ratio_BO, levels.widths, freedom.tables)
            scale_O = half_scale(quadratic.scale(offset_O, ratio_BO, s_O), freedom.gain)
            yield scale_O, offset_O, ratio_BO


def nearest_ratios(
    wanted_BO: Tensor, ratio_BO: Tensor, widths: tuple[int, ...], tables: Mapping[int, Tensor]
) -> Tensor:
    """The table value nearest to each wanted ratio, for the widths that have a table."""
    rounded_BO = ratio_BO.clone()
    for index, width in enumerate(widths):
        if width in tables:
            distance = (wanted_BO[index, :, None] - tables[width]).abs().nan_to_num_(0.0)
            rounded_BO[index] = tables[width][distance.argmin(-1)]
    return rounded_BO
