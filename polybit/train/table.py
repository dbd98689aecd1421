"""Training by name: objectives and schedules, and all that anybody else needs to know of each; torch-free.

A new one is a file here and a line below. An objective is called as `(forward, batch, presets) -> (loss, what to log)`,
a schedule as `(step, presets) -> the presets of that step`; the builders named below make them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Any, Literal

from polybit.core.parts import load

if TYPE_CHECKING:  # the table is read where no torch is loaded
    from polybit.core.plan import Plan

Schedule = Callable[[int, tuple[str, ...]], tuple[str, ...]]
PreferenceLoss = Literal["sigmoid", "ipo"]
Distance = Literal["kl", "mse"]
Share = Literal["sum", "loss", "gradient", "project"]  # how several widths share the weights (balance.Balance)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerKnobs:
    """What `polybit align` can be told of an objective; a builder takes what concerns it.

    beta: inverse temperature of a preference · loss: its form · nll: weight of the negative log-likelihood of the float
    answers beside it · anchor: what leaving the float answer costs · gamma: weight of distillation beside it ·
    shared_prefix: compute the common beginning of a pair once · steps: of the whole run, for objectives in stages.
    """

    beta: float = 0.1
    loss: PreferenceLoss = "sigmoid"
    nll: float = 0.0
    anchor: float = 1.0
    gamma: float = 10.0
    shared_prefix: bool = False
    steps: int = 150


@dataclass(frozen=True, slots=True)
class AnswerObjective:
    """What is learnt from the float model's answers (`polybit align`).

    builder: dotted path of `(AnswerKnobs) -> objective`; the objective says in `needs` which parts of a batch it reads
    (material.Gather) · summary: half a sentence for `--help` · rate: peak learning rate unless told otherwise ·
    static_rate: the same where the model's own answers are never renewed, None = no other · own: whether it looks at
    the model's own answers, so that renewing them has a meaning · pairs: whether it compares both models' answers and
    learns nothing where they are all the same · prefix: whether it can share the beginning of a pair · back: how much
    worse than the best moment a probe may be before the run goes back to that and on at a third of the rate (Picker),
    None = it is stopped after three probes below its start instead · at_teacher: the loss, by the end of a run with the
    default knobs, of a model that says what the float model says.
    """

    builder: str
    summary: str
    rate: float = 3e-4
    static_rate: float | None = None
    own: bool = False
    pairs: bool = False
    prefix: bool = False
    back: float | None = None
    at_teacher: float = 0.0

    def build(self, knobs: AnswerKnobs) -> Any:
        """The objective."""
        return load(self.builder)(knobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class LessonKnobs:
    """What `polybit train` can be told of an objective; a builder takes what concerns it.

    distance: what a student is measured by against its teacher · beta: weight of a teacher beside the data · data:
    weight of the data · teacher: whether the float model teaches too · source: the float model as a model of its own,
    where what its preset shares with the others is trained · pose: what forward gets of a batch, and the right classes
    (None: the learnt tokens of texts).
    """

    distance: Distance = "kl"
    beta: float = 1.0
    data: float = 1.0
    teacher: bool = True
    source: Any = None
    pose: Any = None


@dataclass(frozen=True, slots=True)
class LessonObjective:
    """What several presets of one model learn from data and from each other (`polybit train`).

    builder: dotted path of `(LessonKnobs) -> objective` · summary: half a sentence for `--help` · taught: whether there
    are teachers; without them nothing is left when the data weigh nothing · alone: whether every preset is trained by
    itself, in a run and a checkpoint of its own.
    """

    builder: str
    summary: str
    taught: bool = True
    alone: bool = False

    def build(self, knobs: LessonKnobs) -> Any:
        """The objective."""
        return load(self.builder)(knobs)


@dataclass(frozen=True, slots=True)
class TrainingSchedule:
    """Which presets a step of `polybit train` uses.

    builder: dotted path of `(plans, layers, *, steps, cycles, seed) -> schedule`, plans being preset -> Plan and layers
    the names of what is trained · summary: half a sentence for `--help` · cycles: whether it goes round so many times ·
    all_presets: whether a long enough run uses every preset.
    """

    builder: str
    summary: str
    cycles: bool = False
    all_presets: bool = True

    def build(
        self, plans: Mapping[str, Plan], layers: Sequence[str], *, steps: int, cycles: int, seed: int
    ) -> Schedule:
        """The schedule of one run."""
        return load(self.builder)(plans, layers, steps=steps, cycles=cycles, seed=seed)


def rates(table: Mapping[str, AnswerObjective]) -> str:
    """`3e-04 for kd, kd-own; ...`: the default learning rates, for the help of a flag."""
    found: dict[float, list[str]] = {}
    for name, part in table.items():
        found.setdefault(part.rate, []).append(name)
        if part.static_rate is not None:
            found.setdefault(part.static_rate, []).append(f"{name} without refresh")
    return "; ".join(f"{rate:g} for {', '.join(names)}" for rate, names in found.items())


NO_MARGIN = log(2)  # sigmoid loss of a pair without margin; QDPO starts above it: at the first flip its margin is < 0
STATIC_RATE = 1e-5  # of QDPO without refresh: above it likelihood displacement begins (docs/results/alignment.md)
FALL = 0.1  # share of its best score a preference may lose before it goes back: its rate is another for every model

ANSWER_OBJECTIVES: dict[str, AnswerObjective] = {
    "kd": AnswerObjective("polybit.train.distill:kd", "forward KL on the float model's answers"),
    "kd-own": AnswerObjective("polybit.train.distill:kd_own", "reverse KL on the model's own", own=True),
    "flip": AnswerObjective("polybit.train.distill:flip", "kd that looks at flips"),
    "qdpo": AnswerObjective(
        "polybit.train.preference:qdpo",
        "preference of the float answer to the model's own",
        rate=1e-4,
        static_rate=STATIC_RATE,
        own=True,
        pairs=True,
        prefix=True,
        back=FALL,
        at_teacher=NO_MARGIN,
    ),
    "qdpo+kd": AnswerObjective(
        "polybit.train.preference:qdpo_and_kd",
        "qdpo and kd at once",
        rate=1e-4,
        own=True,
        pairs=True,
        back=FALL,
        at_teacher=NO_MARGIN,
    ),
    "kd-then-qdpo": AnswerObjective(
        "polybit.train.preference:kd_then_qdpo",
        "kd, then both",
        rate=1e-4,
        own=True,
        pairs=True,
        back=FALL,
        at_teacher=NO_MARGIN,
    ),
}
LESSON_OBJECTIVES: dict[str, LessonObjective] = {
    "cdt": LessonObjective("polybit.train.cascade:cdt", "every more precise preset teaches, the float model on top"),
    "joint": LessonObjective("polybit.train.cascade:joint", "the data alone", taught=False),
    "sp": LessonObjective("polybit.train.cascade:sp", "only the most precise one teaches"),
    "recursive": LessonObjective("polybit.train.cascade:recursive", "the next more precise one teaches"),
    "independent": LessonObjective(
        "polybit.train.cascade:independent", "one checkpoint per preset, each trained by itself", alone=True
    ),
}
SCHEDULES: dict[str, TrainingSchedule] = {
    "all": TrainingSchedule("polybit.train.schedules:always_all", "every preset"),
    "cyclic": TrainingSchedule("polybit.train.schedules:cyclic", "one along CPT's cosine", cycles=True),
    "random": TrainingSchedule("polybit.train.schedules:one_drawn", "one drawn at random"),
    "sandwich": TrainingSchedule("polybit.train.schedules:sandwich", "the widest, the narrowest and one between"),
    "fixed": TrainingSchedule("polybit.train.schedules:widest_only", "the widest only", all_presets=False),
}
