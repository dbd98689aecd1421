"""The door to the search for codes, and who does it: the compiled extension (torch tensors in, raw addresses out) in
main memory, Triton and dense products on a GPU (`device_search`), or the twins in torch, the specification."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from polybit.kernels.asked import Clips, Fit, Numbers, Tilts, Walk
from polybit.kernels.extensions import extension

__all__ = ["Clips", "Fit", "Numbers", "Tilts", "Walk"]  # what is asked, beside the functions that answer

KINDS = {torch.float32: "32", torch.float64: "64"}
ZEROS = ("centre", "level", "group")  # in the order of the compiled enumeration
VERSION = 2  # of what is passed between this file and csrc/search.cpp
TRITON = "triton"
ALLOWED: ContextVar[int | str | None] = ContextVar("instruction set of the search", default=0)


@cache
def library() -> ModuleType | None:
    """The compiled extension, or None when the package was built without a compiler."""
    return extension("_search", VERSION)


def instruction_sets() -> list[str]:
    """Names of the instruction sets this processor can run, fastest first; empty without the extension."""
    built = library()
    return built.names() if built else []


@cache
def device_kernels() -> ModuleType | None:
    """The search on a GPU, or None – said once – where triton is not installed."""
    try:
        from polybit.kernels import device_search
    except ImportError:
        warnings.warn(
            "polybit quantizes on this GPU without triton, many times slower: run pip install 'polybit[gpu]'",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return device_search


@contextmanager
def using(isa: int | str | None) -> Iterator[None]:
    """While inside, search with this entry of `instruction_sets`, with TRITON wherever the weight is, or (None) with
    the twins in torch, the specification."""
    token = ALLOWED.set(isa)
    try:
        yield
    finally:
        ALLOWED.reset(token)


def way(weight_OI: Tensor) -> Literal["compiled", "triton", "twin"]:
    """Who searches codes of this weight: the one place that decides it, by where it is and its type."""
    allowed = ALLOWED.get()
    if allowed is None or weight_OI.dtype not in KINDS:
        return "twin"
    if allowed == TRITON or weight_OI.is_cuda:
        return "triton" if device_kernels() is not None else "twin"
    return "compiled" if weight_OI.is_cpu and library() is not None else "twin"


def usable(weight_OI: Tensor) -> bool:
    """Whether the functions of this file take this weight; the twins take every one."""
    return way(weight_OI) != "twin"


def on_device(weight_OI: Tensor) -> Any:
    """The search on a GPU where it is the way of this weight, else None."""
    return device_kernels() if way(weight_OI) == "triton" else None


def function(name: str, dtype: torch.dtype) -> Any:
    """A function of the extension for numbers of this type."""
    return getattr(library(), name + KINDS[dtype])


def built(numbers: Numbers) -> Any:
    """The record of the extension; `numbers` must outlive it."""
    rows, groups = numbers.scale_OG.shape
    assert groups == (-(-numbers.columns // numbers.group_size) if numbers.group_size else 1)
    assert numbers.zero_OG.shape == numbers.scale_OG.shape
    assert numbers.ratio_BOG.shape == (len(numbers.widths), rows, groups)
    tensors = (numbers.scale_OG, numbers.zero_OG, numbers.ratio_BOG)
    assert all(t.is_contiguous() and t.is_cpu and t.dtype == numbers.scale_OG.dtype for t in tensors)
    return function("Levels", numbers.scale_OG.dtype)(
        rows, numbers.columns, numbers.group_size, numbers.bits, list(numbers.widths), list(numbers.emphasis),
        *(t.data_ptr() for t in tensors), list(numbers.bits_G),
    )  # fmt: skip


def alike(numbers: Numbers, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor as the extension reads it beside `numbers`."""
    assert tensor.shape == shape
    return tensor.to(numbers.scale_OG.dtype).contiguous()


def compensate(numbers: Numbers, weight_OI: Tensor, factor_II: Tensor, group_I: Tensor) -> tuple[Tensor, Tensor]:
    """Codes by error compensation, uint8 [O, I], and tr(E_b H E_bᵀ) of every row, [B, O].

    The columns of everything are in the order they are rounded in; group_I: the group of each.
    """
    rows, columns = len(numbers.scale_OG), numbers.columns
    weight_OI = alike(numbers, weight_OI, (rows, columns))
    factor_II = alike(numbers, factor_II, (columns, columns))
    if device := on_device(weight_OI):
        return device.compensate(numbers, weight_OI, factor_II, group_I)
    codes_OI = torch.empty(rows, columns, dtype=torch.uint8)
    loss_BO = weight_OI.new_empty(len(numbers.widths), rows)
    function("compensate", weight_OI.dtype)(
        ALLOWED.get(), built(numbers), weight_OI.data_ptr(), factor_II.data_ptr(), group_I.tolist(),
        codes_OI.data_ptr(), loss_BO.data_ptr(),
    )  # fmt: skip
    return codes_OI, loss_BO


def descend(numbers: Numbers, start: Tensor, hessian_II: Tensor, codes_OI: Tensor, walk: Walk) -> tuple[Tensor, Tensor]:
    """Coordinate descent: new codes, uint8, and the gradient E_b H there, [B, O, I]; `numbers` are fitted in place.

    start: the weight [O, I], or the gradient at the codes given, [B, O, I], where it is known.
    """
    rows, columns, count = len(numbers.scale_OG), numbers.columns, len(numbers.widths)
    hessian_II = alike(numbers, hessian_II, (columns, columns))
    known = start.ndim == 3
    start = alike(numbers, start, (count, rows, columns) if known else (rows, columns))
    if device := on_device(start):
        return device.descend(numbers, start, hessian_II, codes_OI, walk)
    found_OI = codes_OI.to(torch.uint8, copy=True).contiguous()
    gradient_BOI = start.clone() if known else start.new_empty(count, rows, columns)
    fit = walk.fit
    tables = [None if t is None else alike(numbers, t, (16,)) for t in fit.tables] if fit else []
    function("descend", start.dtype)(
        ALLOWED.get(), built(numbers), 0 if known else start.data_ptr(), hessian_II.data_ptr(), found_OI.data_ptr(),
        gradient_BOI.data_ptr(), walk.sweeps, fit is not None, fit is not None and fit.zero, fit.gain if fit else 1.0,
        [0 if t is None else t.data_ptr() for t in tables], walk.held,
    )  # fmt: skip
    return found_OI, gradient_BOI


def search_scales(weight_OI: Tensor, importance_I: Tensor, clips: Clips) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each group, [O, G] both, the scale not yet settled."""
    weight_OI = weight_OI.contiguous()
    rows, columns = weight_OI.shape
    importance_I = importance_I.to(weight_OI).contiguous()
    assert importance_I.shape == (columns,)
    if device := on_device(weight_OI):
        return device.search_scales(weight_OI, importance_I, clips)
    scale_OG = weight_OI.new_empty(rows, len(clips.bits_G))
    zero_OG = torch.empty_like(scale_OG)
    narrow, wide = clips.shrinks
    function("scales", weight_OI.dtype)(
        ALLOWED.get(), rows, columns, clips.group_size, weight_OI.data_ptr(), importance_I.data_ptr(),
        list(clips.bits_G), ZEROS.index(clips.zero), clips.gain, [*narrow, *wide], len(narrow), clips.refine,
        scale_OG.data_ptr(), zero_OG.data_ptr(),
    )  # fmt: skip
    return scale_OG, zero_OG


def search_slices(numbers: Numbers, weight_OI: Tensor, importance_I: Tensor, alone_BOG: Tensor, tilts: Tilts) -> None:
    """Write scale, zero point and ratios of every group into `numbers`; alone_BOG: scales made for each width alone."""
    weight_OI = alike(numbers, weight_OI, (len(numbers.scale_OG), numbers.columns))
    importance_I = alike(numbers, importance_I, (numbers.columns,))
    alone_BOG = alike(numbers, alone_BOG, tuple(numbers.ratio_BOG.shape))
    if device := on_device(weight_OI):
        return device.search_slices(numbers, weight_OI, importance_I, alone_BOG, tilts)
    free = tilts.fixed_zero is None
    function("slices", weight_OI.dtype)(
        ALLOWED.get(), built(numbers), weight_OI.data_ptr(), importance_I.data_ptr(), alone_BOG.data_ptr(), free,
        0.0 if free else tilts.fixed_zero, tilts.gain, list(tilts.shrinks), list(tilts.tilts),
    )  # fmt: skip
