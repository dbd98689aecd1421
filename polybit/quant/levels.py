"""What a code means at each width while codes are being chosen, and the choice itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polybit.core.affine import Grid, QWeight, centre, encode, expand_groups, round_half_up, tops, zero_points


@dataclass(frozen=True, slots=True)
class Levels:
    """Values of the 2^bits codes at every width b of a weight, w_b = s (2^(B-b) r_b (p_b - c_b) + c_B - z).

    scale_OG, zero_OG: working precision · ratio_BOG: one layer per width (1 at the full width) · emphasis_B: λ_b, how
    much a squared error at each width counts. Suffix B = widths here. bits_G: a width per group, with B = 1 and
    ratio 1, for a ragged weight: zero_OG is then in codes of each group's own width.
    """

    bits: int
    group_size: int
    widths: tuple[int, ...]
    emphasis_B: Tensor
    scale_OG: Tensor
    zero_OG: Tensor
    ratio_BOG: Tensor
    bits_G: Tensor | None = None

    @classmethod
    def of(cls, grid: Grid, scale_OG: Tensor, zero: Tensor, columns: int) -> Levels:
        """Levels of a weight on `grid`, plain or ragged, read at its own width only."""
        bits_G = None if grid.bits_G is None else grid.group_bits(columns).to(scale_OG.device)
        return cls.single(grid.bits, grid.group_size, scale_OG, zero, bits_G)

    @classmethod
    def single(cls, bits: int, group_size: int, scale_OG: Tensor, zero: Tensor, bits_G: Tensor | None = None) -> Levels:
        """Levels of an ordinary weight, read at its own width only."""
        ones = torch.ones_like(scale_OG)
        zero_OG = zero_points(zero.to(ones), bits, bits_G) * ones
        return cls(bits, group_size, (bits,), ones.new_ones(1), scale_OG, zero_OG, ones[None], bits_G)

    def top(self, group: int) -> int:
        """Largest code of a group."""
        return (1 << (self.bits if self.bits_G is None else int(self.bits_G[group]))) - 1

    def middle(self, group: int) -> float:
        """Middle of the code range of a group, c_B."""
        return self.top(group) / 2

    def middles(self) -> Tensor | float:
        """Middle of the code range of every group: [G], or one number where all are equal."""
        return centre(self.bits) if self.bits_G is None else tops(self.bits_G).to(self.scale_OG) / 2

    def encode(self, weight_OI: Tensor) -> Tensor:
        """Nearest codes at the full width, uint8 [O, I]."""
        return encode(weight_OI, self.scale_OG, self.zero_OG, self.bits, self.group_size, self.bits_G)

    def rows(self, part: slice) -> Levels:
        """The same for some rows."""
        return replace(
            self, scale_OG=self.scale_OG[part], zero_OG=self.zero_OG[part], ratio_BOG=self.ratio_BOG[:, part]
        )

    def some(self, chosen: list[int]) -> Levels:
        """The same for some of the widths, by their places."""
        return replace(
            self,
            widths=tuple(self.widths[i] for i in chosen),
            emphasis_B=self.emphasis_B[chosen],
            ratio_BOG=self.ratio_BOG[chosen],
        )

    def copy(self) -> Levels:
        """Levels whose numbers can be changed in place without touching these."""
        return replace(
            self, scale_OG=self.scale_OG.clone(), zero_OG=self.zero_OG.clone(), ratio_BOG=self.ratio_BOG.clone()
        )

    def strides(self) -> Tensor:
        """Distance of neighbouring codes at each width in codes of the full width, 2^(B-b): [B, 1, 1]."""
        return self.scale_OG.new_tensor([2.0 ** (self.bits - b) for b in self.widths])[:, None, None]

    def steps(self) -> Tensor:
        """Distance of neighbouring levels, [B, O, G]."""
        return self.scale_OG * self.ratio_BOG * self.strides()

    def offsets(self) -> Tensor:
        """Value of the middle of the code range, the same at every width, [O, G]."""
        return self.scale_OG * (self.middles() - self.zero_OG)

    def prefixes(self, codes: Tensor, group: int | None = None) -> Tensor:
        """p_b - c_b of codes of one group, or of whole rows, one layer per width."""
        if self.bits_G is not None:
            if group is not None:
                return (codes.to(self.scale_OG.dtype) - self.middle(group))[None]
            middles_OG = (tops(self.bits_G).to(self.scale_OG) / 2)[None]
            return (codes.to(self.scale_OG.dtype) - expand_groups(middles_OG, codes.shape[1], self.group_size))[None]
        kept = [(codes >> (self.bits - b)).to(self.scale_OG.dtype) - centre(b) for b in self.widths]
        return torch.stack(kept)

    def values(self, codes_OI: Tensor) -> Tensor:
        """Weights the codes stand for, [B, O, I]."""
        columns = codes_OI.shape[1]
        offset_OI = expand_groups(self.offsets(), columns, self.group_size)
        steps_BOG, prefix_BOI = self.steps(), self.prefixes(codes_OI)
        for step_OG, prefix_OI in zip(steps_BOG, prefix_BOI, strict=True):
            prefix_OI.mul_(expand_groups(step_OG, columns, self.group_size)).add_(offset_OI)
        return prefix_BOI


class Choice:
    """Best codes for one column after another, inside one group: least Σ_b λ_b (w_b(u) - target_b)² over all codes u.

    With one width this is rounding to nearest. With several it is one small matrix product per column: the part of
    the cost that depends on u is Σ_b λ_b S_b² T_b(u)² - 2 Σ_b λ_b S_b (target_b - m) T_b(u), the first sum the same
    for all columns of a group.
    """

    def __init__(self, levels: Levels, group: int) -> None:
        self.step_BO = levels.steps()[:, :, group]
        self.offset_O = levels.offsets()[:, group]
        self.middle, self.top = levels.middle(group), levels.top(group)
        self.joint = len(levels.widths) > 1
        if self.joint:
            codes = torch.arange(1 << levels.bits, device=self.step_BO.device)
            self.table_BU = levels.prefixes(codes)
            self.pull_OB = (levels.emphasis_B[:, None] * self.step_BO).T.contiguous()
            self.own_OU = (self.pull_OB * self.step_BO.T) @ self.table_BU.square()

    def __call__(self, target_BO: Tensor, bounds: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Codes [O] (int64) for the targets of one column, and their values [B, O].

        bounds: smallest and largest code each row may take, int64 [O] both; None: all codes.
        """
        wanted_BO = target_BO - self.offset_O
        if not self.joint:
            level = round_half_up(wanted_BO / self.step_BO + self.middle).clamp_(0, self.top)
            if bounds is not None:
                level = torch.minimum(torch.maximum(level, bounds[0].to(level)), bounds[1].to(level))
            return level[0].long(), (level - self.middle) * self.step_BO + self.offset_O
        cost_OU = torch.addmm(self.own_OU, self.pull_OB * wanted_BO.T, self.table_BU, alpha=-2.0)
        if bounds is not None:
            codes_U = torch.arange(cost_OU.shape[1], device=cost_OU.device)
            outside_OU = (codes_U < bounds[0][:, None]) | (codes_U > bounds[1][:, None])
            cost_OU = cost_OU.masked_fill_(outside_OU, torch.inf)
        codes_O = cost_OU.argmin(1)
        return codes_O, self.table_BU[:, codes_O] * self.step_BO + self.offset_O


def as_qweight(
    codes_OI: Tensor,
    levels: Levels,
    gain: float,
    zero: Tensor,
    ratios: Mapping[int, Tensor] | None = None,
    column_scale_I: Tensor | None = None,
) -> QWeight:
    """Leave working units: the record that is stored. `zero` is the zero point as the grid wants it."""
    scale_OG = (levels.scale_OG.double() * gain).float()
    return QWeight(
        codes_OI.to(torch.uint8),
        scale_OG,
        zero.float(),
        levels.bits,
        levels.group_size,
        dict(ratios or {}),
        column_scale_I,
        None if levels.bits_G is None else levels.bits_G.to(torch.uint8),
    )
