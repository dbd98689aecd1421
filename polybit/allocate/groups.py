"""Layers that engines fuse into one product and that therefore share a width: q/k/v, gate/up, w1/w3."""

from __future__ import annotations

from collections.abc import Iterable

TOGETHER = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
ROLE = {leaf: leaves[0] for leaves in TOGETHER for leaf in leaves}


def fused_groups(names: Iterable[str], *, free: bool = False) -> list[list[str]]:
    """Cut layer names into groups that share a width: what one module path holds of the same family; `free`: none do.

    The order is that of the first name of each group. Experts are fused each for itself (`experts.3.w1` with
    `experts.3.w3`); weights a model already stores fused (qkv, gate_up_proj) are one layer.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        found.setdefault((parent, leaf if free else ROLE.get(leaf, leaf)), []).append(name)
    return list(found.values())
