"""One number for a whole plan: its KL on every text over that of a uniform plan, tasks weighed against general text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from polybit.measure.plan_loss import PlanLoss, PlanReading


class PlanScore:
    """Scores plans as they are read by a PlanLoss; `tasks` and `general` name its probes, tasks weigh beta."""

    def __init__(self, reader: PlanLoss, *, tasks: Sequence[str], general: Sequence[str], beta: float) -> None:
        self.reader = reader
        self.sides = ((beta if tasks else 0.0, tuple(tasks)), (1 - (beta if tasks else 0.0), tuple(general)))
        widths = sorted(next(iter(reader.bank.values())))
        self.middle = widths[len(widths) // 2]
        self.levels: dict[str, float] = {}

    def score(self, readings: Mapping[str, PlanReading]) -> float:
        """Mean KL relative to the uniform plan of the middle width."""
        if not self.levels:
            uniform = self.reader(dict.fromkeys(self.reader.bank, self.middle))
            self.levels = {probe: max(reading.kl, 1e-12) for probe, reading in uniform.items()}
        relative = {probe: reading.kl / self.levels[probe] for probe, reading in readings.items()}
        sides = [(share, [relative[probe] for probe in probes]) for share, probes in self.sides]
        return sum(share * sum(values) / len(values) for share, values in sides if share)

    def __call__(self, plan: Mapping[str, int]) -> float:
        """The score of a plan, measured."""
        return self.score(self.reader(plan))
