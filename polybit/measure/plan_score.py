"""One number for a whole plan: its KL on every text over that of a uniform plan, tasks weighed against general text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from polybit.measure.plan_loss import Bank, PlanReading

Widths = Mapping[str, int]  # layer -> width
ReadPlans = Callable[[Sequence[Widths]], list[dict[str, PlanReading]]]  # readings of each plan by probe


class PlanScore:
    """Scores plans by their readings; `tasks` and `general` name the probes, tasks weigh beta.

    read: reads plans, here or by workers; no plan is read twice · bank: whose layers and widths plans are made of
    """

    def __init__(
        self, read: ReadPlans, bank: Bank, *, tasks: Sequence[str], general: Sequence[str], beta: float
    ) -> None:
        self.read, self.layers = read, tuple(bank)
        self.known: dict[frozenset[tuple[str, int]], dict[str, PlanReading]] = {}
        self.sides = ((beta if tasks else 0.0, tuple(tasks)), (1 - (beta if tasks else 0.0), tuple(general)))
        widths = sorted(next(iter(bank.values())))
        self.middle = widths[len(widths) // 2]

    def readings(self, plans: Sequence[Widths]) -> list[dict[str, PlanReading]]:
        """What each plan does to every probe; those that were not read before are read at once."""
        asked = {frozenset(plan.items()): plan for plan in plans}
        new = {key: plan for key, plan in asked.items() if key not in self.known}
        if new:
            self.known |= dict(zip(new, self.read(list(new.values())), strict=True))
        return [self.known[frozenset(plan.items())] for plan in plans]

    def __call__(self, plans: Sequence[Widths]) -> list[float]:
        """The score of each plan, measured: mean KL relative to the uniform plan of the middle width."""
        uniform, *found = self.readings([dict.fromkeys(self.layers, self.middle), *plans])
        levels = {probe: max(reading.kl, 1e-12) for probe, reading in uniform.items()}
        return [self.score(readings, levels) for readings in found]

    def score(self, readings: Mapping[str, PlanReading], levels: Mapping[str, float]) -> float:
        """Mean KL over the levels of the probes, tasks weighed against general text."""
        relative = {probe: reading.kl / levels[probe] for probe, reading in readings.items()}
        sides = [(share, [relative[probe] for probe in probes]) for share, probes in self.sides]
        return sum(share * sum(values) / len(values) for share, values in sides if share)
