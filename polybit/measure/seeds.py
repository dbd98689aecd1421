"""How sure a number is that a few calibration seeds gave: mean with Student's interval, plain or paired."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev

from polybit.core.records import Estimate

# two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom; beyond the table the normal's is close enough
T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


def over_seeds(values: Sequence[float], paired_with: Sequence[float] | None = None) -> Estimate:
    """Mean of one value per seed with its 95 % Student interval; `paired_with`: of the differences seed by seed.

    A single seed gives an interval of no width, which says nothing: n is 1.
    """
    if paired_with is not None:
        values = [a - b for a, b in zip(values, paired_with, strict=True)]
    middle = fmean(values)
    if len(values) < 2:
        return Estimate(middle, middle, middle, len(values))
    half = T95[min(len(values) - 1, len(T95)) - 1] * stdev(values) / sqrt(len(values))
    return Estimate(middle, middle - half, middle + half, len(values))
