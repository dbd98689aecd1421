"""The questions of `polybit study`, and the arms of the one about switchable precision; a new one is a line below."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BASELINE = "cdt"  # with which the others are compared, and which is searched and attacked


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of training: summary: what is different in it · told: options of `train` other than the study's own."""

    summary: str
    told: Mapping[str, Any] = field(default_factory=dict)


ARMS: dict[str, Arm] = {
    "cdt": Arm("every more precise preset teaches", {"method": "cdt"}),
    "joint": Arm("all presets learn from the data alone", {"method": "joint", "labels": 1.0}),
    "sp": Arm("the most precise one teaches all", {"method": "sp"}),
    "recursive": Arm("each learns from the next more precise one", {"method": "recursive"}),
    "agreeing": Arm(
        "cdt, and presets are pulled together in outputs and hidden states",
        {"method": "cdt", "consistency": 0.5, "alignment": 0.5},
    ),
    "cyclic": Arm(
        "one preset per step along a cosine, from the data", {"method": "joint", "schedule": "cyclic", "labels": 1.0}
    ),
    "random": Arm(
        "one preset per step drawn at random, from the data", {"method": "joint", "schedule": "random", "labels": 1.0}
    ),
    "independent": Arm("a model for each preset alone", {"method": "independent"}),
}


@dataclass(frozen=True, slots=True)
class StudyQuestion:
    """What a study asks of a model.

    summary: half a sentence for `--help` · answer: dotted path of `(model, options) -> numbers`, whose finished parts
    are kept in `options.out` · reading: dotted path of `numbers -> StudyReading`, the page · told: settings that every
    question has, where they are not given.
    """

    summary: str
    answer: str
    reading: str
    told: Mapping[str, Any] = field(default_factory=dict)


STUDIES: dict[str, StudyQuestion] = {
    "conversation": StudyQuestion(
        "does conversation suffer before accuracy, and what mends it",
        "polybit.acts.study_conversation:answers",
        "polybit.report.study_conversation:reading",
        {"steps": 60, "batch": 8, "learning_rate": None, "group_size": 64},
    ),
    "bits": StudyQuestion(
        "do fewer bits, spent where tasks need them, replace even ones",
        "polybit.acts.study_bits:answers",
        "polybit.report.study_bits:reading",
        {"group_size": 64},
    ),
    "switchable": StudyQuestion(
        "is one model good at several precisions",
        "polybit.acts.study_switchable:answers",
        "polybit.report.study_switchable:reading",
        {"steps": 60, "batch": 8, "learning_rate": 2e-4, "group_size": 0},
    ),
}
