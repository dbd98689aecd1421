"""What `study` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from polybit.acts.table import ARMS, BASELINE
from polybit.core.parts import described, pick
from polybit.core.runtime import PolybitError
from polybit.data.table import EMBEDDED
from polybit.options.checks import at_least, names_of, seeds_of, squad_is_there


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """How to compare ways of training one model at several precisions."""

    out: Path
    """Directory of all runs and of the page."""
    presets: str = "A=w8a8,B=w4a4,C=w3a4"
    """Names and precisions, with commas."""
    squad: str = EMBEDDED
    """Questions to score on: a SQuAD .json, or embedded for the reading task."""
    data: str = EMBEDDED
    """What to train on, as in polybit train."""
    arms: str = field(
        default=",".join(ARMS),
        metadata={"help": f"What is trained and compared, with commas, {BASELINE} among them: {described(ARMS)}."},
    )
    steps: int = 60
    """Gradient steps of every run."""
    batch: int = 8
    """Rows per step."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    labels: float = 1.0
    """Weight of the data beside the teachers, for the arms that have teachers."""
    rows: int | None = None
    """Rows of the data to use."""
    length: int | None = None
    """Longest row in tokens."""
    cycles: int = 4
    """Cycles of the cyclic arm."""
    seeds: str = "0"
    """Seeds of training, with commas; scores are pooled over them."""
    teacher: bool = True
    """The float model teaches too; --no-teacher where it has not learnt the task yet."""
    group_size: int = 0
    """Weights that share a scale."""
    items: int = 100
    """Questions to score."""
    attack_items: int = 12
    """Questions to attack; 0 = no attack."""
    evaluations: int = 24
    """Whole models the frontier may measure beside its starts."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""

    def __post_init__(self) -> None:
        names = names_of(self.arms)
        if BASELINE not in names:
            raise PolybitError(f"--arms {self.arms!r:.80} lacks {BASELINE}, with which the others are compared: add it")
        for name in names:
            pick(ARMS, name, "--arms")
        at_least(self, items=1, steps=1, attack_items=0)
        if len(names_of(self.presets)) < 2:
            raise PolybitError("--presets needs two or more: a study compares them")
        squad_is_there("--squad", self.squad)
        seeds_of(self.seeds)
