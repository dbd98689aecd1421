"""The problem every calibrated quantizer solves at one layer: least output error, tr(E H Eᵀ) with E = Ŵ - W."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from polybit.core.affine import QWeight, scale_gain
from polybit.core.records import LayerStats
from polybit.core.runtime import PolybitError

SMALL = 1 << 16  # weights up to which float64 costs nothing worth saving; float32 finds codes as good


@dataclass(frozen=True, slots=True)
class Problem:
    """A layer in working units: weight_OI divided by a power of two `gain`, damped Hessian with mean diagonal 1."""

    weight_OI: Tensor
    hessian_II: Tensor
    gain: float

    @property
    def importance_I(self) -> Tensor:
        """How much a squared error in each input column costs when the other columns are exact: diag(H)."""
        return self.hessian_II.diagonal()


def pose(weight_OI: Tensor, stats: LayerStats | None, *, damp: float = 0.01) -> Problem:
    """Check a weight and its statistics and bring both to working units.

    Without statistics the Hessian is the identity: plain squared error of the weight. `damp` times the mean diagonal is
    added to the diagonal (GPTQ, arXiv 2210.17323, §3.3). Unlike the paper's code, columns the calibration never
    excited keep their weights: the damping alone makes them round to nearest.
    Raises PolybitError for weights or statistics that are not finite or do not fit together.
    """
    weight = check_weight(weight_OI)
    gain = scale_gain(weight)
    dtype = torch.float64 if weight.numel() <= SMALL else torch.float32
    columns = weight.shape[1]
    plain = partial(torch.eye, columns, dtype=dtype, device=weight.device)
    if stats is None:
        return Problem(weight.to(dtype) / gain, plain(), gain)
    if stats.hessian_II.shape != (columns, columns):
        raise PolybitError(
            f"calibration statistics are for {stats.hessian_II.shape[0]} input columns but the weight has {columns}: "
            "collect them again for this model"
        )
    if not bool(torch.isfinite(stats.hessian_II).all()):
        raise PolybitError(
            "calibration statistics hold NaN or infinite values where finite numbers are needed: "
            "calibrate with other text or in float32"
        )
    level = float(stats.hessian_II.diagonal().double().mean())
    if level <= 0.0:
        return Problem(weight.to(dtype) / gain, plain(), gain)
    hessian = torch.empty(columns, columns, dtype=dtype, device=weight.device)
    for part in row_chunks(columns, columns, limit=1 << 22):  # a float64 copy of it all would be twice its size
        both = (
            stats.hessian_II[part].to(weight.device).double() + stats.hessian_II[:, part].to(weight.device).double().T
        )
        hessian[part] = both / (2 * level)
    hessian.diagonal().add_(damp)
    return Problem(weight.to(dtype) / gain, hessian, gain)


def check_weight(weight_OI: Tensor) -> Tensor:
    """The weight itself, detached, refused unless it is a finite matrix."""
    if weight_OI.ndim != 2 or not weight_OI.numel():
        raise PolybitError(f"a weight to quantize is a non-empty matrix, got shape {tuple(weight_OI.shape)}")
    if not bool(torch.isfinite(weight_OI).all()):
        bad = int((~torch.isfinite(weight_OI)).sum())
        raise PolybitError(
            f"the weight holds {bad} NaN or infinite values where finite numbers are needed: mend the checkpoint"
        )
    return weight_OI.detach()


def inverse_factor(hessian_II: Tensor) -> Tensor:
    """Upper Cholesky factor U of the inverse Hessian, H^-1 = Uᵀ U (GPTQ, step 3).

    Computed in float64. When rounding has made H indefinite the damping is raised tenfold until it is not.
    """
    extra = 0.0
    while True:  # never more than two matrices in float64 at once
        damped = hessian_II.double() if hessian_II.dtype != torch.float64 else hessian_II.clone()
        damped.diagonal().add_(extra)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            del inverse
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper.to(hessian_II.dtype)
            del upper
        extra = max(10 * extra, 1e-6)


def row_chunks(rows: int, elements_per_row: int, *, limit: int = 1 << 25) -> Iterator[slice]:
    """Slices of rows whose working tensors stay below `limit` elements."""
    size = max(1, limit // max(1, elements_per_row))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def layer_loss(weight_OI: Tensor, q: QWeight, stats: LayerStats | None, width: int | None = None) -> float:
    """Harm of a quantized layer at `width` bits: mean squared error of its output over calibration tokens, summed over
    outputs, tr(E H Eᵀ); without statistics the squared error of the weight itself."""
    error = q.dequantize(width).double() - weight_OI.detach().double()
    weighed = error if stats is None else error @ stats.hessian_II.double()
    return float((weighed * error).sum())
