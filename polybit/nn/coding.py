"""Rows of numbers as few-bit codes with a scale and a lowest value per group, packed densely into bytes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from polybit.core.affine import encode, expand_groups, split_groups

LARGEST = 65504.0  # of a 16-bit float


def code_rows(x_RC: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round rows to `bits` bits between the lowest and highest value of each group.

    Returns codes uint8 [R, C], scale and lowest value float16 [R, G].
    """
    grouped, mask = split_groups(x_RC.float(), group)
    low_RG = torch.where(mask, grouped, torch.inf).amin(-1).clamp(-LARGEST, LARGEST).half()
    high_RG = torch.where(mask, grouped, -torch.inf).amax(-1).clamp(-LARGEST, LARGEST)
    scale_RG = ((high_RG - low_RG.float()) / ((1 << bits) - 1)).clamp_min(2.0**-24).half()
    above_RC = x_RC.float() - expand_groups(low_RG.float(), x_RC.shape[1], group)
    codes_RC = encode(above_RC, scale_RG.float(), above_RC.new_zeros(()), bits, group)
    return codes_RC, scale_RG, low_RG


def decode_rows(codes_RC: Tensor, scale_RG: Tensor, low_RG: Tensor, group: int) -> Tensor:
    """The inverse of code_rows, float32 [R, C]."""
    columns = codes_RC.shape[1]
    step_RC, low_RC = (expand_groups(part.float(), columns, group) for part in (scale_RG, low_RG))
    return low_RC + step_RC * codes_RC


def fields(bits: int) -> list[int]:
    """How a code of `bits` bits is cut so that every part divides a byte: 7 = 4 + 2 + 1."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def pack_rows(codes_RC: Tensor, bits: int) -> Tensor:
    """uint8 codes -> bytes [R, bits * ceil(C / 8)], nothing wasted but the padding to 8 channels."""
    padded = pad(codes_RC, (0, -codes_RC.shape[1] % 8))
    if bits == 8:
        return padded
    parts, left = [], bits
    for width in fields(bits):
        left -= width
        part = (padded >> left) & ((1 << width) - 1)
        each = 8 // width
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes_RC.device)
        parts.append((part.view(len(part), -1, each) << shifts).sum(-1, dtype=torch.uint8))
    return torch.cat(parts, dim=1)


def unpack_rows(bytes_RN: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of pack_rows, uint8 [R, columns]."""
    if bits == 8:
        return bytes_RN[:, :columns]
    eighths = -(-columns // 8)
    codes = torch.zeros(len(bytes_RN), eighths * 8, dtype=torch.uint8, device=bytes_RN.device)
    start = 0
    for width in fields(bits):
        part = bytes_RN[:, start : start + eighths * width]
        start += eighths * width
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=bytes_RN.device)
        values = (part.unsqueeze(-1) >> shifts) & ((1 << width) - 1)
        codes = (codes << width) | values.flatten(1) if width < 8 else values.flatten(1)
    return codes[:, :columns]
