"""The frontier of harm against cost over precisions per layer: exact for harms that add up, greedy, evolutionary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from polybit.allocate.knapsack import WidthChoice, solve
from polybit.core.runtime import PolybitError

Table = Mapping[str, Mapping[str, "Option"]]  # layer -> precision, as in "w4a8" -> what it costs and harms
Loss = Callable[[Mapping[str, str]], float]  # precisions by layer -> measured harm of the whole model


@dataclass(frozen=True, slots=True)
class Option:
    """One precision of one layer: its cost (bytes, bit operations; any unit that adds up) and its harm."""

    cost: float
    harm: float


@dataclass(frozen=True, slots=True)
class FrontierPoint:
    """One assignment of precisions to layers, with its cost and harm, and who found it."""

    choice: Mapping[str, str]
    cost: float
    harm: float
    found_by: str = ""


def price(table: Table, choice: Mapping[str, str], found_by: str = "") -> FrontierPoint:
    """The point of a choice when harms add up."""
    cost = sum(table[name][key].cost for name, key in choice.items())
    harm = sum(table[name][key].harm for name, key in choice.items())
    return FrontierPoint(dict(choice), cost, harm, found_by)


def check_table(table: Table) -> None:
    """Refuse a table without layers or with a layer without precisions."""
    if not table or not all(table.values()):
        raise PolybitError("a frontier needs at least one layer, each with at least one precision to choose from")


def frontier(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The points no other is better than: cheapest first, each harming less than every cheaper one."""
    best: list[FrontierPoint] = []
    for point in sorted(points, key=lambda p: (p.cost, p.harm)):
        if not best or point.harm < best[-1].harm:
            best.append(point)
    return best


def extremes(table: Table) -> tuple[float, float]:
    """Least and greatest cost a choice can have."""
    rows = [[option.cost for option in row.values()] for row in table.values()]
    return sum(map(min, rows)), sum(map(max, rows))


def exact(table: Table, *, points: int = 12) -> list[FrontierPoint]:
    """The least harm within each of `points` equally spaced budgets, by the exact allocator (a 0-1 programme)."""
    check_table(table)
    keys = {name: list(row) for name, row in table.items()}
    choices = {
        name: {at: WidthChoice(table[name][key].cost, table[name][key].harm) for at, key in enumerate(row)}
        for name, row in keys.items()
    }
    low, high = extremes(table)
    budgets = [low + (high - low) * step / max(points - 1, 1) for step in range(points)]
    found = []
    for budget in budgets:
        widths = solve(choices, [[name] for name in table], budget)
        found.append(price(table, {name: keys[name][at] for name, at in widths.items()}, "exact"))
    return frontier(found)


def greedy(table: Table) -> list[FrontierPoint]:
    """From the least harmful choice, always the step that adds least harm per cost it saves, to the cheapest."""
    check_table(table)
    choice = {name: min(row, key=lambda key: (row[key].harm, row[key].cost)) for name, row in table.items()}
    found = [price(table, choice, "greedy")]
    while True:
        steps = [
            ((option.harm - table[name][now].harm) / (table[name][now].cost - option.cost), name, key)
            for name, now in choice.items()
            for key, option in table[name].items()
            if option.cost < table[name][now].cost
        ]
        if not steps:
            return frontier(found)
        _, name, key = min(steps)
        choice = {**choice, name: key}
        found.append(price(table, choice, "greedy"))


def evolve(
    table: Table,
    loss: Loss,
    *,
    start: Sequence[FrontierPoint],
    evaluations: int = 60,
    seed: int = 0,
) -> list[FrontierPoint]:
    """A frontier of measured harms: changed copies of the best choices replace those they are better than.

    Begins with the choices of `start` (measured too, so that the result is never worse than they are). Then, until
    `evaluations` models were measured, takes one choice of the frontier or crosses two neighbours, changes one or two
    layers to another precision, and keeps what is not dominated: the search of InstantNet's and EvoPress's kind (arXiv
    2410.14649), for harms that do not add up. Returns every measured point; `frontier` gives the best of them.
    """
    check_table(table)
    rng = Random(seed)
    measured: dict[tuple[str, ...], FrontierPoint] = {}

    def measure(choice: Mapping[str, str], found_by: str) -> None:
        key = tuple(choice[name] for name in table)
        if key not in measured and len(measured) < evaluations:
            cost = sum(table[name][value].cost for name, value in choice.items())
            measured[key] = FrontierPoint(dict(choice), cost, loss(choice), found_by)

    for point in start:
        measure(point.choice, point.found_by or "start")
    tries = 0
    while len(measured) < evaluations and tries < 20 * evaluations:
        tries += 1
        best = frontier(list(measured.values()))
        at = rng.randrange(len(best))
        mother = best[at].choice
        father = best[min(at + 1, len(best) - 1)].choice
        mixed = rng.random() < 0.5
        child = {name: father[name] if mixed and rng.random() < 0.5 else mother[name] for name in table}
        for name in rng.sample(list(table), min(len(table), rng.choice((1, 2)))):
            child[name] = rng.choice(list(table[name]))
        measure(child, "evolved")
    return list(measured.values())


def cheapest_within(points: Sequence[FrontierPoint], harm: float) -> FrontierPoint:
    """The cheapest point that harms at most so much."""
    good = [point for point in points if point.harm <= harm]
    if not good:
        least = min((point.harm for point in points), default=float("nan"))
        raise PolybitError(f"no choice harms at most {harm:.4g}, the least is {least:.4g}: allow more harm")
    return min(good, key=lambda point: (point.cost, point.harm))
