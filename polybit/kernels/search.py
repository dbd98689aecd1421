"""The door to the compiled search for codes: torch tensors in, raw addresses out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from polybit.kernels.extensions import extension

KINDS = {torch.float32: "32", torch.float64: "64"}
ZEROS = ("centre", "level", "group")  # in the order of the compiled enumeration
VERSION = 2  # of what is passed between this file and csrc/search.cpp
ALLOWED: ContextVar[int | None] = ContextVar("instruction set of the search", default=0)


@cache
def library() -> ModuleType | None:
    """The compiled extension, or None when the package was built without a compiler."""
    return extension("_search", VERSION)


def instruction_sets() -> list[str]:
    """Names of the instruction sets this processor can run, fastest first; empty without the extension."""
    built = library()
    return built.names() if built else []


@contextmanager
def using(isa: int | None) -> Iterator[None]:
    """While inside, search with this entry of `instruction_sets`; None: with the twins in torch, the specification."""
    token = ALLOWED.set(isa)
    try:
        yield
    finally:
        ALLOWED.reset(token)


def usable(weight_OI: Tensor) -> bool:
    """Whether the compiled search takes this weight: in main memory, in float32 or float64."""
    return ALLOWED.get() is not None and weight_OI.is_cpu and weight_OI.dtype in KINDS and library() is not None


def function(name: str, dtype: torch.dtype) -> Any:
    """A function of the extension for numbers of this type."""
    return getattr(library(), name + KINDS[dtype])


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

    def built(self) -> Any:
        """The record of the extension; this object must outlive it."""
        rows, groups = self.scale_OG.shape
        assert groups == (-(-self.columns // self.group_size) if self.group_size else 1)
        assert self.zero_OG.shape == self.scale_OG.shape
        assert self.ratio_BOG.shape == (len(self.widths), rows, groups)
        numbers = (self.scale_OG, self.zero_OG, self.ratio_BOG)
        assert all(t.is_contiguous() and t.is_cpu and t.dtype == self.scale_OG.dtype for t in numbers)
        return function("Levels", self.scale_OG.dtype)(
            rows, self.columns, self.group_size, self.bits, list(self.widths), list(self.emphasis),
            *(t.data_ptr() for t in numbers), list(self.bits_G),
        )  # fmt: skip


def alike(numbers: Numbers, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor as the extension reads it beside `numbers`."""
    assert tensor.shape == shape
    return tensor.to(numbers.scale_OG.dtype).contiguous()


def compensate(numbers: Numbers, weight_OI: Tensor, factor_II: Tensor, group_I: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Codes by error compensation, uint8 [O, I], and tr(E_b H E_bᵀ) of every row, [B, O].

    The columns of everything are in the order they are rounded in.
    """
    rows, columns = len(numbers.scale_OG), numbers.columns
    weight_OI = alike(numbers, weight_OI, (rows, columns))
    factor_II = alike(numbers, factor_II, (columns, columns))
    codes_OI = torch.empty(rows, columns, dtype=torch.uint8)
    loss_BO = weight_OI.new_empty(len(numbers.widths), rows)
    function("compensate", weight_OI.dtype)(
        ALLOWED.get(), numbers.built(), weight_OI.data_ptr(), factor_II.data_ptr(), list(group_I), codes_OI.data_ptr(),
        loss_BO.data_ptr(),
    )  # fmt: skip
    return codes_OI, loss_BO


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


def descend(numbers: Numbers, start: Tensor, hessian_II: Tensor, codes_OI: Tensor, walk: Walk) -> tuple[Tensor, Tensor]:
    """Coordinate descent: new codes, uint8, and the gradient E_b H there, [B, O, I]; `numbers` are fitted in place.

    start: the weight [O, I], or the gradient at the codes given, [B, O, I], where it is known.
    """
    rows, columns, count = len(numbers.scale_OG), numbers.columns, len(numbers.widths)
    hessian_II = alike(numbers, hessian_II, (columns, columns))
    found_OI = codes_OI.to(torch.uint8, copy=True).contiguous()
    known = start.ndim == 3
    start = alike(numbers, start, (count, rows, columns) if known else (rows, columns))
    gradient_BOI = start.clone() if known else start.new_empty(count, rows, columns)
    fit = walk.fit
    tables = [None if t is None else alike(numbers, t, (16,)) for t in fit.tables] if fit else []
    function("descend", start.dtype)(
        ALLOWED.get(), numbers.built(), 0 if known else start.data_ptr(), hessian_II.data_ptr(), found_OI.data_ptr(),
        gradient_BOI.data_ptr(), walk.sweeps, fit is not None, fit is not None and fit.zero, fit.gain if fit else 1.0,
        [0 if t is None else t.data_ptr() for t in tables], walk.held,
    )  # fmt: skip
    return found_OI, gradient_BOI


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


def search_scales(weight_OI: Tensor, importance_I: Tensor, clips: Clips) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group, [O, G] both, the scale not yet settled."""
    weight_OI = weight_OI.contiguous()
    rows, columns = weight_OI.shape
    importance_I = importance_I.to(weight_OI).contiguous()
    assert importance_I.shape == (columns,)
    scale_OG = weight_OI.new_empty(rows, len(clips.bits_G))
    zero_OG = torch.empty_like(scale_OG)
    narrow, wide = clips.shrinks
    function("scales", weight_OI.dtype)(
        ALLOWED.get(), rows, columns, clips.group_size, weight_OI.data_ptr(), importance_I.data_ptr(),
        list(clips.bits_G), ZEROS.index(clips.zero), clips.gain, [*narrow, *wide], len(narrow), clips.refine,
        scale_OG.data_ptr(), zero_OG.data_ptr(),
    )  # fmt: skip
    return scale_OG, zero_OG


@dataclass(frozen=True, slots=True)
class Tilts:
    """A search over clipping ranges and tilts (quant.slices.start_levels); fixed_zero: None where it is free."""

    gain: float
    fixed_zero: float | None
    shrinks: tuple[float, ...]
    tilts: tuple[float, ...]


def search_slices(numbers: Numbers, weight_OI: Tensor, importance_I: Tensor, alone_BOG: Tensor, tilts: Tilts) -> None:
    """Write scale, zero point and ratios of every group into `numbers`; alone_BOG: scales made for each width alone."""
    weight_OI = alike(numbers, weight_OI, (len(numbers.scale_OG), numbers.columns))
    importance_I = alike(numbers, importance_I, (numbers.columns,))
    alone_BOG = alike(numbers, alone_BOG, tuple(numbers.ratio_BOG.shape))
    free = tilts.fixed_zero is None
    function("slices", weight_OI.dtype)(
        ALLOWED.get(), numbers.built(), weight_OI.data_ptr(), importance_I.data_ptr(), alone_BOG.data_ptr(), free,
        0.0 if free else tilts.fixed_zero, tilts.gain, list(tilts.shrinks), list(tilts.tilts),
    )  # fmt: skip
