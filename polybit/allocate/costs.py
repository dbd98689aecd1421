"""From measured sensitivities to one table of harms: cleaned of noise, made comparable, added up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from polybit.core.records import CostTable
from polybit.core.runtime import PolybitError

Normalize = Literal["nats", "minmax"]


def falling(values: Sequence[float]) -> list[float]:
    """The non-increasing sequence nearest to `values` in squares (pool adjacent violators, Barlow et al. 1972)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((float(value), 1))
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (b, m), (a, n) = pools.pop(), pools.pop()
            pools.append(((a * n + b * m) / (n + m), n + m))
    return [mean for mean, count in pools for _ in range(count)]


def clean(table: CostTable) -> CostTable:
    """Harms that no noise can exploit: never below 0, never rising with the width."""
    nats = {}
    for name, row in table.nats.items():
        widths = sorted(row)
        nats[name] = dict(zip(widths, falling([max(row[w], 0.0) for w in widths]), strict=True))
    return CostTable(nats, dict(table.sizes))


def combine(task: CostTable, general: CostTable, beta: float = 0.7, *, normalize: Normalize = "minmax") -> CostTable:
    """S = beta * task + (1 - beta) * general per layer and width (TASA, arXiv 2607.00908).

    Both tables are cleaned first. "minmax" brings each signal to 0..1 over all layers and widths, so that beta weighs
    them alike whatever their size; the result has no unit then. "nats" adds nats per token as they are.
    """
    if not 0 <= beta <= 1:
        raise PolybitError(f"beta {beta} is not possible: give 0 (general text only) to 1 (tasks only)")
    if set(task.nats) != set(general.nats):
        odd = sorted(set(task.nats) ^ set(general.nats))
        raise PolybitError(f"the two sensitivities are of different models, first difference {odd[0]!r}: measure both")
    ours, theirs = (rescaled(clean(table), normalize) for table in (task, general))
    nats = {
        name: {w: beta * row[w] + (1 - beta) * theirs.nats[name][w] for w in row if w in theirs.nats[name]}
        for name, row in ours.nats.items()
    }
    return CostTable(nats, dict(task.sizes))


def rescaled(table: CostTable, normalize: Normalize) -> CostTable:
    """A cleaned table as it is, or brought to 0..1; one without any harm stays 0."""
    if normalize == "nats":
        return table
    values = [value for row in table.nats.values() for value in row.values()]
    low, high = min(values, default=0.0), max(values, default=0.0)
    spread = (high - low) or 1.0
    nats = {name: {w: (v - low) / spread for w, v in row.items()} for name, row in table.nats.items()}
    return CostTable(nats, dict(table.sizes))


def mean_tables(tables: Sequence[CostTable]) -> CostTable:
    """The mean of several tables of one model, each in its own unit already made comparable."""
    first = tables[0]
    nats = {
        name: {w: sum(t.nats[name][w] for t in tables) / len(tables) for w in row} for name, row in first.nats.items()
    }
    return CostTable(nats, dict(first.sizes))


def harms(
    tables: Mapping[str, CostTable], general: Sequence[str], tasks: Sequence[str], beta: float = 0.7
) -> CostTable:
    """One table from the tables of all texts: general texts averaged, tasks averaged, both weighed by beta."""
    cleaned = {name: rescaled(clean(table), "minmax") for name, table in tables.items()}
    everywhere = mean_tables([cleaned[name] for name in general])
    if not tasks:
        return everywhere
    return combine(mean_tables([cleaned[name] for name in tasks]), everywhere, beta)
