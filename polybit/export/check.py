"""What an engine would read beside what polybit reads: how many weights differ, and by how much of a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from polybit.core.runtime import PolybitError
from polybit.export.weights import Material

SMALLEST = torch.finfo(torch.float16).smallest_normal


@dataclass(slots=True)
class Difference:
    """Decoded weights against ours, over all quantized layers.

    weights: how many were compared · differing: not the same number bit for bit · moved: off by half a step or more,
    so that another code was meant · tiny: how many of these lie in groups whose step is below what a float16 holds with
    all its digits, 6e-5 · largest: the largest difference in steps · relative: root mean square of the
    difference over that of the weights.
    """

    weights: int = 0
    differing: int = 0
    moved: int = 0
    tiny: int = 0
    largest: float = 0.0
    relative: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain numbers."""
        return asdict(self)


def compare(material: Material, decoded: Iterable[tuple[str, Tensor]]) -> Difference:
    """Compare every quantized layer with what was decoded of it; a layer that is not there is refused."""
    found, waiting = Difference(), set(material.layers)
    off = power = 0.0
    for name, weight_OI in decoded:
        waiting.discard(name)
        ours_OI = material.decoded(name)
        if weight_OI.shape != ours_OI.shape or not bool(torch.isfinite(weight_OI).all()):
            raise PolybitError(f"the export of {name!r:.120} reads back as another matrix: report this as a fault")
        apart_OI, step_OI = (weight_OI - ours_OI).abs(), material.step(name)
        steps_OI = apart_OI / step_OI
        found.weights += apart_OI.numel()
        found.differing += int((weight_OI != ours_OI).sum())
        found.moved += int((steps_OI >= 0.5).sum())
        found.tiny += int(((steps_OI >= 0.5) & (step_OI < SMALLEST)).sum())
        found.largest = max(found.largest, float(steps_OI.max()))
        off += float(apart_OI.double().square().sum())
        power += float(ours_OI.double().square().sum())
    if waiting:
        raise PolybitError(f"the export lacks the layer {min(waiting)!r:.120}: report this as a fault")
    found.relative = sqrt(off / power) if power else 0.0
    return found
