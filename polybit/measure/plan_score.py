"""One number for a whole plan: its KL on every text over that of a uniform plan, tasks weighed against general text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from polybit.measure.plan_loss import Bank, PlanReading

Widths = Mapping[str, int]  # layer -> width
ReadPlans = Callable[[Sequence[Widths]], list[dict[str, PlanReading]]]  # readings of each plan by probe


class PlanScore:
    """Scores plans by their readings; `tasks` and `general` name the probes, tasks weigh beta.

    read: reads plans, here or by workers · bank: whose layers and widths plans are made of
    """

    def __init__(
        self, read: ReadPlans, bank: Bank, *, tasks: Sequence[str], general: Sequence[str], beta: float
    ) -> None:
        self.read, self.layers = read, tuple(bank)
        self.sides = ((beta if tasks else 0.0, tuple(tasks)), (1 - (beta if tasks else 0.0), tuple(general)))
        widths = sorted(next(iter(bank.values())))
        self.middle = widths[len(widths) // 2]
        self.levels: dict[str, float] = {}

    def score(self, readings: Mapping[str, PlanReading]) -> float:
        """Mean KL relative to the uniform plan of the middle width."""
        if not self.levels:
            uniform = self.read([dict.fromkeys(self.layers, self.middle)])[0]
            self.levels = {probe: max(reading.kl, 1e-12) for probe, reading in uniform.items()}
        relative = {probe: reading.kl / self.levels[probe] for probe, reading in readings.items()}
        sides = [(share, [relative[probe] for probe in probes]) for share, probes in self.sides]
        return sum(share * sum(values) / len(values) for share, values in sides if share)

    def __call__(self, plans: Sequence[Widths]) -> list[float]:
        """The score of each plan, measured."""
        return [self.score(readings) for readings in self.read(plans)]
