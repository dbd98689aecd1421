"""Rows of token ids of different lengths as rectangular batches with little padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from polybit.core.runtime import PolybitError


def pad(rows: Sequence[Sequence[int]], fill: int, *, side: Literal["left", "right"] = "right") -> tuple[Tensor, Tensor]:
    """Stack rows into ids_BT (int64) and mask_BT (bool, True at real tokens), filled up on one side."""
    width = max((len(row) for row in rows), default=0)
    ids_BT = torch.full((len(rows), width), fill, dtype=torch.int64)
    mask_BT = torch.zeros((len(rows), width), dtype=torch.bool)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids_BT[index, place] = torch.as_tensor(row, dtype=torch.int64)
        mask_BT[index, place] = True
    return ids_BT, mask_BT


def buckets(lengths: Sequence[int], *, tokens: int, rows: int | None = None) -> list[list[int]]:
    """Group row numbers so that each group's padded size, rows x longest, stays within `tokens`; longest first.

    Every row appears once; a row longer than `tokens` is a group by itself. `rows` caps the rows of a group.
    """
    if tokens < 1 or (rows is not None and rows < 1):
        raise PolybitError(f"A batch of {tokens} tokens and {rows} rows is empty; allow at least 1 of each.")
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    groups: list[list[int]] = []
    for index in order:
        group = groups[-1] if groups else None
        # sorted by length, so a group's first row is its longest
        full = group is None or (len(group) + 1) * lengths[group[0]] > tokens or len(group) == rows
        if full:
            groups.append([index])
        else:
            assert group is not None
            group.append(index)
    return groups


def same_context(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[list[int]]:
    """Numbers of the pairs, those that follow each other with the same context together."""
    found: list[list[int]] = []
    for n, (context, _) in enumerate(pairs):
        if found and context and list(pairs[n - 1][0]) == list(context):
            found[-1].append(n)
        else:
            found.append([n])
    return found
