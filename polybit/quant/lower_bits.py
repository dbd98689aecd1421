"""The trailing bits of a nested code chosen again while its leading ones stay: wide widths after narrow ones moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from polybit.core.affine import Grid, QWeight
from polybit.core.records import LayerStats
from polybit.core.runtime import PolybitError
from polybit.quant.descent import descend
from polybit.quant.levels import Levels
from polybit.quant.nested import EMPHASIS, loss_alone
from polybit.quant.problem import inverse_factor, pose

SWEEPS = 8


def lower_bits(
    weight_OI: Tensor, stats: LayerStats | None, q: QWeight, *, held: int, widths: Sequence[int] | None = None
) -> QWeight:
    """`q` with every bit after the leading `held` chosen for the least output error at `widths` (default: all stored).

    Coordinate descent on Σ_b λ_b tr(E_b H E_bᵀ) over the codes that share their leading bits with q's, so what widths
    up to `held` read does not change; λ as in `nested`. Weights that had to leave their place are made up for by
    those that did not. Scales, zero points and ratios stay.
    """
    chosen = sorted(set(widths or (q.bits,)) | {q.bits}, reverse=True)
    if not 0 < held < min(chosen):
        raise PolybitError(
            f"bits below the leading {held} cannot be chosen for widths {chosen}: hold fewer bits than each has"
        )
    if q.bits_G is not None:
        raise PolybitError("lower bits are chosen for weights of one width, this one has a width per group")
    if q.column_scale_I is not None:
        raise PolybitError("lower bits are chosen for nested weights, which have no column scale")
    problem = pose(weight_OI, stats)
    factor_II = inverse_factor(problem.hessian_II)
    ones_OG = torch.ones_like(q.scale_OG, dtype=problem.weight_OI.dtype)
    ratios = [q.ratios.get(b, torch.ones(())).to(ones_OG) * ones_OG if b < q.bits else ones_OG for b in chosen]
    alone = [loss_alone(problem, factor_II, Grid(b, q.group_size)) for b in chosen]
    emphasis_B = ones_OG.new_tensor([EMPHASIS[b] / loss for b, loss in zip(chosen, alone, strict=True)])
    levels = Levels(
        q.bits, q.group_size, tuple(chosen), emphasis_B / emphasis_B.sum(), q.scale_OG.to(ones_OG) / problem.gain,
        q.zero.to(ones_OG) * ones_OG, torch.stack(ratios),
    )  # fmt: skip
    codes_OI, _ = descend(problem, q.codes_OI.long(), levels, sweeps=SWEEPS, freedom=None, held=held)
    return replace(q, codes_OI=codes_OI.to(torch.uint8))
