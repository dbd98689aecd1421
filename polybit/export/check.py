"""What an engine would read beside what polybit reads: how many weights differ, and by how much of a step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
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
    difference over that of the weights · where: layer -> how many of its weights moved, for those in which one did.
    """

    weights: int = 0
    differing: int = 0
    moved: int = 0
    tiny: int = 0
    largest: float = 0.0
    relative: float = 0.0
    where: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain numbers."""
        return asdict(self)


def moves(material: Material, name: str, weight_OI: Tensor) -> bool:
    """Whether a layer decoded so holds a weight that means another code, or none at all."""
    parts = material.parts(name)
    # what is not a number is not below
    return not all(bool(((weight_OI[rows] - ours_RI).abs() / step_RI < 0.5).all()) for rows, ours_RI, step_RI in parts)


def compare(material: Material, decoded: Iterable[tuple[str, Tensor]]) -> Difference:
    """Compare every quantized layer with what was decoded of it; a layer that is not there is refused."""
    found, waiting = Difference(), set(material.layers)
    off = power = 0.0
    for name, weight_OI in decoded:
        waiting.discard(name)
        if weight_OI.shape != material.layers[name].fields.shape:
            raise PolybitError(f"the export of {name!r:.120} reads back as another matrix: report this as a fault")
        moved = 0
        for rows, ours_RI, step_RI in material.parts(name):
            theirs_RI = weight_OI[rows]
            if not bool(torch.isfinite(theirs_RI).all()):
                raise PolybitError(
                    f"the weights of {name!r:.120} reach {float(ours_RI.abs().max()):.3g}, which scales in "
                    f"{str(material.dtype).removeprefix('torch.')} cannot hold: give another --dtype, or --exact"
                )
            apart_RI = (theirs_RI - ours_RI).abs()
            steps_RI = apart_RI / step_RI
            found.weights += apart_RI.numel()
            found.differing += int((theirs_RI != ours_RI).sum())
            moved += int((steps_RI >= 0.5).sum())
            found.tiny += int(((steps_RI >= 0.5) & (step_RI < SMALLEST)).sum())
            found.largest = max(found.largest, float(steps_RI.max()))
            off += float(apart_RI.double().square().sum())
            power += float(ours_RI.double().square().sum())
        if moved:
            found.where[name] = moved
        found.moved += moved
        del weight_OI, theirs_RI  # before the next one is made
    if waiting:
        raise PolybitError(f"the export lacks the layer {min(waiting)!r:.120}: report this as a fault")
    found.relative = sqrt(off / power) if power else 0.0
    return found
