"""Weights and calibration statistics the quantizer tests share."""

import torch
from torch import Tensor

from polybit.core.records import LayerStats


def layer(rows: int, columns: int, seed: int = 0, tokens: int = 2048) -> tuple[Tensor, LayerStats]:
    """A Gaussian weight behind strongly correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = torch.randn(rows, columns, generator=generator)
    mixing_II = torch.eye(columns) + 3 * torch.randn(columns, columns, generator=generator) / columns**0.5
    return weight_OI, stats(torch.randn(tokens, columns, generator=generator) @ mixing_II)


def stats(inputs_TI: Tensor) -> LayerStats:
    """What calibration records about these inputs."""
    return LayerStats(inputs_TI.T @ inputs_TI / len(inputs_TI), inputs_TI.abs().mean(0), len(inputs_TI))
