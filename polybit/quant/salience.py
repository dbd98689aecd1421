"""Which columns deserve more bits: OBS salience before quantizing, and where a quantized layer's loss sits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from polybit.core.affine import QWeight
from polybit.core.records import LayerStats
from polybit.quant.problem import inverse_factor, pose


def column_salience(weight_OI: Tensor, stats: LayerStats | None, *, damp: float = 0.01) -> Tensor:
    """How much the layer's output would change if a column were removed, [I]: Σ over rows of w² / U_cc².

    U is the upper Cholesky factor of the inverse Hessian: U_cc² is [H⁻¹]_cc once the columns before c are fixed, as in
    optimal brain surgery. SliM-LLM (Huang et al., arXiv 2405.14917, eq. 5), whose blocks TASA ranks by it.
    """
    problem = pose(weight_OI, stats, damp=damp)
    spread_I = inverse_factor(problem.hessian_II).diagonal()
    return (problem.weight_OI.square().sum(0) / spread_I.square()).float()


def column_losses(weight_OI: Tensor, q: QWeight, stats: LayerStats | None, *, damp: float = 0.01) -> Tensor:
    """The layer loss tr(E H Eᵀ) split over columns, [I]: squared columns of E U⁻¹, E = Ŵ - W, which add up to it.

    H⁻¹ = Uᵀ U, so E H Eᵀ = (E U⁻¹)(E U⁻¹)ᵀ: a column's share is what it costs after all later columns have made up
    for it as well as they can, as GPTQ lets them. In units of the problem (Hessian of mean diagonal 1, damped).
    """
    problem = pose(weight_OI, stats, damp=damp)
    factor_II = inverse_factor(problem.hessian_II)
    error_OI = q.dequantize().to(problem.weight_OI) / problem.gain - problem.weight_OI
    shares_OI = torch.linalg.solve_triangular(factor_II, error_OI, upper=True, left=False)
    return shares_OI.square().sum(0).float()


def over_blocks(values_I: Tensor, block: int) -> Tensor:
    """Sum column values over blocks of `block` columns, [K]; the last block may be shorter."""
    padded = torch.nn.functional.pad(values_I, (0, -len(values_I) % block))
    return padded.view(-1, block).sum(1)


def block_losses(weight_OI: Tensor, by_width: Mapping[int, QWeight], stats: LayerStats | None, block: int) -> Tensor:
    """Loss of every block of columns at every width of `by_width`, narrowest first, [K, W]."""
    rows = [over_blocks(column_losses(weight_OI, by_width[b], stats), block) for b in sorted(by_width)]
    return torch.stack(rows, 1)
