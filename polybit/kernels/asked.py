"""What the search for codes is asked and writes to, whoever does it: tensors and numbers, no way of computing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Numbers:
    """What codes mean at every width (quant.levels.Levels), as the extension reads and writes it.

    scale_OG, zero_OG, ratio_BOG: contiguous, of one type, written in place · bits_G: a width per group, or empty.
    """

    columns: int
    group_size: int
    bits: int
    widths: tuple[int, ...]
    emphasis: tuple[float, ...]
    scale_OG: Tensor
    zero_OG: Tensor
    ratio_BOG: Tensor
    bits_G: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Fit:
    """What a pass of descent may change beside the codes (quant.fit.FitFreedom): scales, zero points if `zero`, and the
    ratios of the widths that have a table."""

    gain: float
    zero: bool
    tables: tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True)
class Walk:
    """A walk of coordinate descent: passes, what they may fit (None: nothing), leading bits of a code that stay."""

    sweeps: int
    fit: Fit | None = None
    held: int = 0


@dataclass(frozen=True, slots=True)
class Clips:
    """A clip search (quant.scales.search_scale): widths of the groups, kind of zero point, and what is tried.

    shrinks: clipping ranges of groups below 4 bits, and of the others · refine: steps that fit the scale.
    """

    group_size: int
    bits_G: tuple[int, ...]
    zero: str
    gain: float
    shrinks: tuple[tuple[float, ...], tuple[float, ...]]
    refine: int


@dataclass(frozen=True, slots=True)
class Tilts:
    """A search over clipping ranges and tilts (quant.slices.start_levels); fixed_zero: None where it is free."""

    gain: float
    fixed_zero: float | None
    shrinks: tuple[float, ...]
    tilts: tuple[float, ...]
