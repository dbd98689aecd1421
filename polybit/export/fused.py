"""Layers that engines multiply together must share a width and a group size, or the export is refused."""

from __future__ import annotations

from collections.abc import Mapping

from polybit.core.runtime import PolybitError
from polybit.nn.linear import QuantWeight

TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),
)


def check_fused(layers: Mapping[str, QuantWeight], label: str) -> None:
    """Refuse widths or group sizes that differ inside a group, naming the layers."""
    for members in TOGETHER:
        parents = {name.rpartition(".")[0] for name in layers if name.rpartition(".")[2] in members}
        for parent in sorted(parents):
            names = [f"{parent}.{leaf}" for leaf in members if f"{parent}.{leaf}" in layers]
            schemes = {name: (layers[name].width, layers[name].group_size) for name in names}
            if len(set(schemes.values())) > 1:
                said = ", ".join(
                    f"{name} w{width} in groups of {size or 'a row'}" for name, (width, size) in schemes.items()
                )
                raise PolybitError(
                    f"engines of --to {label} multiply these layers together, so they must share one width: {said}; "
                    "make the plan with `polybit allocate`, which keeps them together, or use another format"
                )
