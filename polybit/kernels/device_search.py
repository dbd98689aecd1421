"""The search for codes on a GPU: the walks as dense products between blocks of columns that Triton walks through.

The lazy batches of GPTQ (arXiv 2210.17323 §3.3) twice over: what moved in a block of columns reaches the rest of its
stretch (STRETCH columns) at once, and everything else when the stretch is done, by one product deep enough to be worth
the memory it passes. Rows are done together, as many as LARGEST allows. Same interface and results as the compiled
search (`search`), which calls this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from polybit.kernels.asked import Clips, Fit, Numbers, Tilts, Walk
from polybit.kernels.triton_fit import fit_rows
from polybit.kernels.triton_scales import clip_groups, slice_groups
from polybit.kernels.triton_walk import INTERPRETED, compensate_block, descend_block

BLOCK = 64  # columns of a tile
STRETCH = 256  # columns between two updates of everything else
LARGEST = 1 << 27  # numbers of one working tensor
ROW_TILE, MOST_ROWS = (256, 256) if INTERPRETED else (16, 8)  # rows times widths, and rows, of a program that walks
GROUP_TILE = 1 << 16 if INTERPRETED else 512  # weights of a program that searches; interpreted, every program costs


@contextmanager
def at_work(tensor: Tensor) -> Iterator[None]:
    """While inside, float32 products are float32, whatever torch was told about TF32, and Triton starts kernels where
    the tensor is."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.cuda.device_of(tensor):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def powers(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


def tile_rows(widths: int, size: int) -> int:
    """Rows of a program that walks, for numbers of `size` bytes: what one warp has registers for."""
    return max(1, min(ROW_TILE // widths, MOST_ROWS) * 4 // size)


def parts(rows: int, each: int) -> Iterator[slice]:
    """Slices of rows whose working tensor of `each` numbers a row stays below LARGEST."""
    size = max(1, LARGEST // each)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


class Codes:
    """What codes mean (search.Numbers) as kernels read it, for some rows; scale, zero and ratio are views."""

    def __init__(self, numbers: Numbers, part: slice) -> None:
        self.columns, self.size = numbers.columns, numbers.group_size or numbers.columns
        self.count, self.padded = len(numbers.widths), powers(len(numbers.widths))
        self.rows, self.groups = numbers.scale_OG[part].shape
        self.plane, self.bits = numbers.scale_OG.numel(), numbers.bits
        self.scale_OG, self.zero_OG = numbers.scale_OG[part], numbers.zero_OG[part]
        self.ratio_BOG = numbers.ratio_BOG[:, part]
        new = numbers.scale_OG.new_tensor
        bits_G = numbers.bits_G or (numbers.bits,) * self.groups
        self.tops_G = new([float((1 << b) - 1) for b in bits_G])
        fill = [0.0] * (self.padded - self.count)
        strides = [2.0 ** (numbers.bits - b) for b in numbers.widths]
        centres = [((1 << b) - 1) / 2 for b in numbers.widths]
        self.widths_3B = new([[*numbers.emphasis, *fill], strides + [1.0] * len(fill), centres + fill])
        second = numbers.widths[1] if self.count > 1 else 0
        self.shape: dict[str, Any] = {"COUNT": self.count, "WIDTHS": self.padded}
        self.tree: dict[str, Any] = {"PARENTS": 1 << second, "CHILDREN": 1 << (numbers.bits - second)}
        self.tile = tile_rows(self.padded, numbers.scale_OG.element_size())

    def meaning(self) -> tuple[Tensor, ...]:
        """The tensors every kernel is given, in its order."""
        return self.scale_OG, self.zero_OG, self.ratio_BOG, self.tops_G, self.widths_3B

    def here(self, group: int) -> slice:
        """Columns of a group."""
        return slice(group * self.size, min((group + 1) * self.size, self.columns))

    def prefixes(self, codes_Oi: Tensor, group: int) -> Tensor:
        """(p_b - c_b) 2^(B-b) of codes of a group, [B, O, i]."""
        if self.count == 1:
            return (codes_Oi.to(self.tops_G.dtype) - self.tops_G[group] / 2)[None]
        stride_B11, centre_B11 = (row[: self.count, None, None] for row in self.widths_3B[1:])
        return (codes_Oi.to(stride_B11.dtype) / stride_B11).floor_().sub_(centre_B11).mul_(stride_B11)

    def values(self, codes_OI: Tensor) -> Tensor:
        """Values of codes of all columns, [B, O, I]."""
        value_BOI = self.scale_OG.new_empty(self.count, *codes_OI.shape)
        for group in range(self.groups):
            here = self.here(group)
            offset_O = self.scale_OG[:, group] * (self.tops_G[group] / 2 - self.zero_OG[:, group])
            step_BO = self.scale_OG[:, group] * self.ratio_BOG[:, :, group]
            prefix_BOi = self.prefixes(codes_OI[:, here], group)
            value_BOI[:, :, here] = prefix_BOi.mul_(step_BO[..., None]).add_(offset_O[:, None])
        return value_BOI


def stretches(columns: int, size: int) -> Iterator[slice]:
    """Stretches of columns, whole groups of `size` each."""
    length = max(size, STRETCH // size * size)
    return (slice(start, min(start + length, columns)) for start in range(0, columns, length))


def compensate(numbers: Numbers, weight_OI: Tensor, factor_II: Tensor, group_I: Tensor) -> tuple[Tensor, Tensor]:
    """`search.compensate` on a GPU."""
    rows, columns = weight_OI.shape
    codes_OI = torch.empty(rows, columns, dtype=torch.uint8, device=weight_OI.device)
    loss_BO = weight_OI.new_zeros(len(numbers.widths), rows)
    group_I = group_I.to(torch.int32).contiguous()
    size = numbers.group_size or columns
    in_order = size % BLOCK == 0 or size >= columns
    in_order = in_order and bool(torch.equal(group_I, torch.arange(columns, device=group_I.device) // size))
    for part in parts(rows, len(numbers.widths) * columns):
        codes, losses_BO = Codes(numbers, part), loss_BO[:, part].contiguous()
        with at_work(weight_OI):
            compensate_rows(codes, weight_OI[part], factor_II, group_I, (codes_OI[part], losses_BO), in_order)
        loss_BO[:, part] = losses_BO
    return codes_OI, loss_BO


def compensate_rows(
    codes: Codes,
    weight_OI: Tensor,
    factor_II: Tensor,
    group_I: Tensor,
    out: tuple[Tensor, Tensor],
    in_order: bool,
) -> None:
    """Some rows; out: their codes and losses. in_order: every block of columns lies in one group."""
    rows, columns = weight_OI.shape
    working_NI = weight_OI.repeat(codes.count, 1)
    length = min(STRETCH, columns)
    errors_Ns = working_NI.new_empty(len(working_NI), length)
    for begin in range(0, columns, length):
        end = min(begin + length, columns)
        for first in range(begin, end, BLOCK):
            stop = min(first + BLOCK, end)
            compensate_block[(-(-rows // codes.tile),)](
                working_NI, errors_Ns[:, first - begin :], out[0], out[1], factor_II, *codes.meaning(), group_I,
                rows, columns, first, stop - first, codes.groups, codes.plane, length,
                **codes.shape, **codes.tree, ONE_GROUP=in_order, ROWS=codes.tile, COLUMNS=BLOCK,
                num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
            block_Nc = errors_Ns[:, first - begin : stop - begin]
            working_NI[:, stop:end].addmm_(block_Nc, factor_II[first:stop, stop:end], alpha=-1)
        working_NI[:, end:].addmm_(errors_Ns[:, : end - begin], factor_II[begin:end, end:], alpha=-1)


def descend(numbers: Numbers, start: Tensor, hessian_II: Tensor, codes_OI: Tensor, walk: Walk) -> tuple[Tensor, Tensor]:
    """`search.descend` on a GPU."""
    rows, columns = codes_OI.shape
    count, known = len(numbers.widths), start.ndim == 3
    found_OI = codes_OI.to(torch.uint8, copy=True).contiguous()
    gradient_BOI = start.clone() if known else start.new_empty(count, rows, columns)
    pieces = list(parts(rows, count * columns))
    for part in pieces:
        codes = Codes(numbers, part)
        local_BOI = gradient_BOI[:, part] if len(pieces) == 1 else gradient_BOI[:, part].contiguous()
        with at_work(start):
            if not known:
                error_BOI = codes.values(found_OI[part]).sub_(start[part])
                torch.mm(error_BOI.flatten(0, 1), hessian_II, out=local_BOI.flatten(0, 1))
                del error_BOI
            Descent(codes, found_OI[part], local_BOI.flatten(0, 1), hessian_II, walk).run()
        if len(pieces) > 1:
            gradient_BOI[:, part] = local_BOI
    return found_OI, gradient_BOI


class Descent:
    """A walk of coordinate descent over some rows: codes_OI and gradient_NI (N: widths times rows) change in place."""

    def __init__(self, codes: Codes, codes_OI: Tensor, gradient_NI: Tensor, hessian_II: Tensor, walk: Walk) -> None:
        self.codes, self.codes_OI, self.gradient_NI, self.hessian_II = codes, codes_OI, gradient_NI, hessian_II
        self.walk = walk
        if walk.fit is not None and walk.sweeps:
            self.prepare_fit(walk.fit)

    def prepare_fit(self, fit: Fit) -> None:
        """What every fit of a group needs."""
        codes, hessian_II = self.codes, self.hessian_II
        self.sums_I, self.whole_G = hessian_II.new_empty(codes.columns), hessian_II.new_empty(codes.groups)
        for group in range(codes.groups):
            here = codes.here(group)
            self.sums_I[here] = hessian_II[here, here].sum(0)
            self.whole_G[group] = self.sums_I[here].sum()
        self.tables_BT = hessian_II.new_ones(codes.padded, 16)
        has = [False] * codes.padded
        for index, table in enumerate(fit.tables):
            if table is not None:
                self.tables_BT[index], has[index] = table.to(self.tables_BT), True
        self.has_tables_B, self.tabled = torch.tensor(has, dtype=torch.int32, device=hessian_II.device), any(has)

    def run(self) -> None:
        """All sweeps, or until nothing changes where nothing is fitted."""
        codes, hessian_II = self.codes, self.hessian_II
        size, columns = codes.size, codes.columns
        for sweep in range(self.walk.sweeps):
            ask = self.walk.fit is None and sweep + 1 < self.walk.sweeps
            before_OI = self.codes_OI.clone() if ask else None
            for stretch in stretches(columns, size):
                total_Ns = self.gradient_NI.new_zeros(len(self.gradient_NI), stretch.stop - stretch.start)
                for first in range(stretch.start, stretch.stop, size):
                    here = codes.here(first // size)
                    inside = slice(here.start - stretch.start, here.stop - stretch.start)
                    self.walk_group(first // size, here, total_Ns[:, inside])
                    self.gradient_NI[:, stretch].addmm_(total_Ns[:, inside], hessian_II[here, stretch])
                for rest in (slice(0, stretch.start), slice(stretch.stop, columns)):
                    if rest.start < rest.stop:
                        self.gradient_NI[:, rest].addmm_(total_Ns, hessian_II[stretch, rest])
            if before_OI is not None and torch.equal(before_OI, self.codes_OI):
                break

    def walk_group(self, group: int, here: slice, total_Ni: Tensor) -> None:
        """Fits one group, then walks through its columns; total_Ni: how far its values moved, zero before."""
        codes, hessian_II, walk = self.codes, self.hessian_II, self.walk
        slope_Ni = self.gradient_NI[:, here]
        if walk.fit is not None:
            self.fit_group(group, here, walk.fit, total_Ni)
            slope_Ni = torch.addmm(slope_Ni, total_Ni, hessian_II[here, here])
        elif here.stop - here.start > BLOCK:
            slope_Ni = slope_Ni.clone()
        for first in range(here.start, here.stop, BLOCK):
            stop = min(first + BLOCK, here.stop)
            at = slice(first - here.start, stop - here.start)
            moved_Nc = total_Ni.new_empty(len(total_Ni), stop - first)
            descend_block[(-(-codes.rows // codes.tile),)](
                self.codes_OI, slope_Ni[:, at], moved_Nc, total_Ni[:, at], hessian_II, *codes.meaning(),
                codes.rows, codes.columns, first, stop - first, group, codes.groups, codes.plane,
                slope_Ni.stride(0), total_Ni.stride(0), 1 << (codes.bits - walk.held),
                **codes.shape, **codes.tree, HELD=walk.held > 0, ROWS=codes.tile,
                COLUMNS=min(BLOCK, powers(codes.size)), num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
            if stop < here.stop:
                slope_Ni[:, at.stop :].addmm_(moved_Nc, hessian_II[first:stop, stop : here.stop])

    def fit_group(self, group: int, here: slice, fit: Fit, moved_Ni: Tensor) -> None:
        """Scale, zero point and ratios of one group; moved_Ni: how far its values move by it, out."""
        codes = self.codes
        prefix_BOi = codes.prefixes(self.codes_OI[:, here], group)
        pushed_Ni = prefix_BOi.flatten(0, 1) @ self.hessian_II[here, here]
        fit_rows[(-(-codes.rows // codes.tile),)](
            self.codes_OI, self.gradient_NI, pushed_Ni, self.sums_I, self.whole_G, moved_Ni, *codes.meaning(),
            self.tables_BT, self.has_tables_B, codes.rows, codes.columns, here.start, here.stop - here.start, group,
            codes.groups, codes.plane, moved_Ni.stride(0), fit.gain,
            **codes.shape, ZERO=fit.zero, TABLES=self.tabled, ROWS=codes.tile, COLUMNS=min(16, powers(codes.size)),
            num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip


def search_scales(weight_OI: Tensor, importance_I: Tensor, clips: Clips) -> tuple[Tensor, Tensor]:
    """`search.search_scales` on a GPU."""
    rows, columns = weight_OI.shape
    size = clips.group_size or columns
    scale_OG = weight_OI.new_empty(rows, len(clips.bits_G))
    zero_OG = torch.empty_like(scale_OG)
    bits_G = torch.tensor(clips.bits_G, dtype=torch.int32, device=weight_OI.device)
    wide = powers(size)
    tall = max(1, GROUP_TILE // wide)
    with at_work(weight_OI):
        clip_groups[(-(-rows // tall), len(clips.bits_G))](
            weight_OI, importance_I, bits_G, weight_OI.new_tensor(clips.shrinks), scale_OG, zero_OG,
            rows, columns, size, len(clips.bits_G), clips.gain, len(clips.shrinks[0]),
            KIND=("centre", "level", "group").index(clips.zero), REFINE=clips.refine, ROWS=tall, COLUMNS=wide,
            num_warps=warps_of(wide), enable_fp_fusion=True,
        )  # fmt: skip
    return scale_OG, zero_OG


def search_slices(numbers: Numbers, weight_OI: Tensor, importance_I: Tensor, alone_BOG: Tensor, tilts: Tilts) -> None:
    """`search.search_slices` on a GPU."""
    rows, columns = weight_OI.shape
    codes = Codes(numbers, slice(0, rows))
    wide = powers(codes.size)
    tall = max(1, GROUP_TILE // 2 // wide)
    with at_work(weight_OI):
        slice_groups[(-(-rows // tall), codes.groups)](
            weight_OI, importance_I, alone_BOG, weight_OI.new_tensor(tilts.shrinks), weight_OI.new_tensor(tilts.tilts),
            numbers.scale_OG, numbers.zero_OG, numbers.ratio_BOG, codes.widths_3B,
            rows, columns, codes.size, codes.groups, codes.plane, tilts.gain, tilts.fixed_zero or 0.0,
            len(tilts.shrinks), len(tilts.tilts), float((1 << numbers.bits) - 1),
            FREE=tilts.fixed_zero is None, **codes.shape, ROWS=tall, COLUMNS=wide,
            num_warps=warps_of(wide), enable_fp_fusion=True,
        )  # fmt: skip


def warps_of(wide: int) -> int:
    """Warps of a program that holds so many columns of a row."""
    return max(1, min(16, wide // 512))
