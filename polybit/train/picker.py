"""Which moment of a training run is kept: the best by held-out flips and KL, never by the loss or reward accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from polybit.core.runtime import write_json
from polybit.hub.files import read_json

Probed = Mapping[str, Mapping[str, float]]  # preset -> {"flips": share, "kl": nats per token, ...}
JUDGED = ("flips", "kl")
HISTORY = "probes.json"


@dataclass(slots=True)
class Picker:
    """Judges every probe of a run against its start, preset by preset.

    slack: how far above its start a width's flips or KL may lie, as a share of the start, before that moment is refused
    (the guard per width) · alarm, patience: so many probes in a row with every width that far below the start stop the
    run; the first steps of a good run may well be a hair below · judged: numbers of a probe that count, low is good ·
    allowed: widths that are stored with the others but not trained -> nats of KL they may lose, or `alarm`
    as a share where that is more; they count nothing otherwise · exact: a trained width whose KL at the start is below
    so many nats is treated like these, with so much allowed, as long as another one has more to gain · back: a probe
    whose score lies above the best one's by more than this share sends the run back to the best weights (`goes_back`),
    and the alarm is off; None = never.
    """

    slack: float = 0.0
    alarm: float = 0.05
    patience: int = 3
    judged: Sequence[str] = JUDGED
    allowed: Mapping[str, float] = field(default_factory=dict)
    exact: float = 0.0
    back: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    stopped: str | None = None

    def judge(self, step: int, probed: Probed) -> bool:
        """Enter the probe of a step; True when it is the best so far. The first probe entered is the start."""
        worse = {} if not self.history else self.below_start(probed, self.slack)
        lost = {} if not self.history else self.below_start(probed, max(self.alarm, self.slack))
        entry: dict[str, Any] = {"step": step, "presets": {k: dict(v) for k, v in probed.items()}, "worse": worse}
        entry["lost"] = sorted(lost)
        entry["score"] = 1.0 if not self.history else self.score(probed)
        best = self.best
        if self.back is not None and best is not None:
            entry["back"] = bool(lost) or not entry["score"] <= best["score"] * (1 + self.back)
        self.history.append(entry)
        excused = self.excused
        trained = len(probed) - len(excused)
        falling = [e for e in self.history[-self.patience :] if len({*e["lost"]} - excused.keys()) == trained]
        if len(falling) == self.patience and self.back is None:
            names = ", ".join(sorted(worse))
            self.stopped = (
                f"stopped at step {step}: {names} fell below the start for {self.patience} probes in a row "
                f"({'; '.join(worse.values())}); a lower learning rate is the usual remedy"
            )
        return best is None or (not worse and entry["score"] < best["score"])

    @property
    def goes_back(self) -> bool:
        """Whether the last probe was so much worse than the best that the run goes on from the best weights."""
        return bool(self.history and self.history[-1].get("back"))

    @property
    def excused(self) -> Mapping[str, float]:
        """Widths that only must not lose more than so many nats: those allowed, and those nearly exact at the start."""
        start = self.history[0]["presets"]
        trained = [name for name in start if name not in self.allowed]
        near = [name for name in trained if start[name].get("kl", float("inf")) < self.exact]
        return {**self.allowed, **dict.fromkeys(near if len(near) < len(trained) else (), self.exact)}

    def below_start(self, probed: Probed, slack: float) -> dict[str, str]:
        """The widths that are worse than at the start by more than a share, each with what is worse."""
        start = self.history[0]["presets"]
        found, excused = {}, self.excused
        for name, numbers in probed.items():
            for key in ("kl",) if name in excused else self.judged:
                now, then = numbers[key], start[name][key]
                most = then * (1 + slack)
                if name in excused:
                    most = then + max(excused[name], self.alarm * then)
                if not isfinite(now) or now > most:
                    found[name] = f"{name}: {key} {now:.4g}, at the start {then:.4g}"
        return found

    def score(self, probed: Probed) -> float:
        """Mean over widths of flips and KL relative to the start: 1 = no gain, 0 = the float model; lower is better."""
        start = self.history[0]["presets"]
        counted = {name: now for name, now in probed.items() if name not in self.excused}
        pairs = [(now[key], start[name][key]) for name, now in counted.items() for key in self.judged]
        shares = [now / max(then, 1e-12) for now, then in pairs]
        return sum(shares) / len(shares)

    @property
    def best(self) -> dict[str, Any] | None:
        """The entry that is kept: the lowest score among those no width of which is below its start."""
        good = [entry for entry in self.history if not entry["worse"]]
        return min(good, key=lambda entry: entry["score"]) if good else None

    def reason(self) -> str:
        """One sentence on what was kept and why."""
        best = self.best
        judged = f"held-out {' and '.join(key.replace('kl', 'KL') for key in self.judged)}"
        if best is None:
            return "nothing was probed"
        if self.stopped:
            return f"{self.stopped}; step {best['step']} is kept"
        returns = sum(bool(entry.get("back")) for entry in self.history)
        if best["step"] == self.history[0]["step"] and len(self.history) > 1:
            last = "; ".join(self.history[-1]["worse"].values()) or "no later probe was better"
            return f"the start is kept, because every later probe was below it for some width ({last})"
        gone = f", after {returns} returns to the best weights at a smaller rate" if returns else ""
        return f"step {best['step']} is kept, the best of {len(self.history)} probes by {judged}{gone}"

    def write(self, directory: Path) -> None:
        """Keep the history beside the run."""
        write_json(directory / HISTORY, {"history": self.history, "stopped": self.stopped})

    def read(self, directory: Path, *, until: int) -> None:
        """Take over the history of an interrupted run up to a step; what came later is probed again."""
        found: Sequence[dict[str, Any]] = []
        if (directory / HISTORY).is_file():
            found = read_json(directory / HISTORY)["history"]
        self.history = [entry for entry in found if entry["step"] <= until]
        self.stopped = None
