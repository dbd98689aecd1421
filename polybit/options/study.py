"""What `study` can be told: what every question has, and a part for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from polybit.acts.table import ARMS, BASELINE, STUDIES
from polybit.core.parts import described, pick
from polybit.core.precision import check_width
from polybit.core.runtime import PolybitError
from polybit.data.table import EMBEDDED
from polybit.measure.table import SIGNALS
from polybit.options.checks import at_least, names_of, seeds_of, squad_is_there
from polybit.quant.table import FIXED, LAYERWISE, QUANTIZERS
from polybit.train.table import ANSWER_OBJECTIVES

if TYPE_CHECKING:
    QuestionName = str
    How = str
    Layerwise = str
else:
    QuestionName = Literal[tuple(STUDIES)]
    How = Literal[tuple(SIGNALS)]
    Layerwise = Literal[LAYERWISE]


def defaults(name: str) -> str:
    """`60 for conversation, switchable`: what a setting is where it is not given, for its help."""
    found: dict[str, list[str]] = {}
    for question, part in STUDIES.items():
        if name in part.told:
            value = part.told[name]
            found.setdefault("the method's own" if value is None else f"{value:g}", []).append(question)
    return "; ".join(f"{value} for {', '.join(names)}" for value, names in found.items())


@dataclass(frozen=True, kw_only=True)
class SwitchableOptions:
    """One model trained for several precisions."""

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
    labels: float = 1.0
    """Weight of the data beside the teachers, for the arms that have teachers."""
    rows: int | None = None
    """Rows of the data to use."""
    length: int | None = None
    """Longest row in tokens."""
    cycles: int = 4
    """Cycles of the cyclic arm."""
    teacher: bool = True
    """The float model teaches too; --no-teacher where it has not learnt the task yet."""
    items: int = 100
    """Questions to score."""
    attack_items: int = 12
    """Questions to attack; 0 = no attack."""
    evaluations: int = 24
    """Whole models the frontier may measure beside its starts."""

    def __post_init__(self) -> None:
        names = names_of(self.arms)
        if BASELINE not in names:
            raise PolybitError(f"--arms {self.arms!r:.80} lacks {BASELINE}, with which the others are compared: add it")
        for name in names:
            pick(ARMS, name, "--arms")
        at_least(self, items=1, attack_items=0)
        if len(names_of(self.presets)) < 2:
            raise PolybitError("--presets needs two or more: a study compares them")
        squad_is_there("--squad", self.squad)


@dataclass(frozen=True, kw_only=True)
class ConversationOptions:
    """A chat model, quantized and aligned: its answers beside its scores."""

    prompts: str = EMBEDDED
    """What is asked, as in polybit pairs, sources with commas; some are kept for measuring."""
    train_prompts: int = 400
    """Prompts to align on."""
    test_prompts: int = 100
    """Prompts to measure on, none of which is trained on or chooses a moment."""
    prompt_tokens: int = 128
    """Longer prompts are left out."""
    max_tokens: int = 48
    """Longest answer."""
    bits: str = "4,3"
    """Widths, with commas."""
    quantizers: str = "rtn,awq,gptq,rounding,nested"
    """Methods to quantize with, with commas."""
    aligned_bits: str = "3"
    """Widths that are aligned, with commas."""
    starts: str = "rtn,gptq"
    """Which of the quantizers alignment starts from, with commas."""
    objectives: str = field(
        default="kd,qdpo,qdpo+kd",
        metadata={"help": f"What is learnt, with commas: {described(ANSWER_OBJECTIVES)}."},
    )
    calibration: str = "auto"
    """Text to calibrate on, as in polybit quantize."""
    samples: int = 32
    """Windows of calibration text, and of each general text to read needs on."""
    window: int | None = None
    """Tokens per window (default: 256 or 512 by the model's context)."""
    text: str = "embedded-test"
    """Text for perplexity: a file, a named set or a dataset id."""
    text_windows: int = 16
    """Windows of it, of 256 tokens."""
    choices: str | None = None
    """Sets of questions with choices, with commas, as in polybit eval; without, a tinychat is asked its own tasks."""
    choice_items: int = 100
    """Questions of each."""

    def __post_init__(self) -> None:
        for flag, names, table in (
            ("--quantizers", self.quantizers, QUANTIZERS),
            ("--objectives", self.objectives, ANSWER_OBJECTIVES),
            ("--starts", self.starts, dict.fromkeys(names_of(self.quantizers))),
        ):
            for name in names_of(names):
                pick(table, name, flag)
        for text in (*names_of(self.bits), *names_of(self.aligned_bits)):
            check_width("w", int(text) if text.isdigit() else 0)
        for width in names_of(self.aligned_bits):
            if width not in names_of(self.bits):
                raise PolybitError(f"--aligned-bits {self.aligned_bits} is not among --bits {self.bits}: add it there")
        at_least(
            self, train_prompts=2, test_prompts=1, prompt_tokens=1, max_tokens=1, samples=1, text_windows=1,
            choice_items=1,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BitsOptions:
    """Bits spent where tasks need them, against even ones."""

    tasks: str = ""
    """Tasks that matter, as in polybit allocate, with commas (default: the embedded ones for tinychat)."""
    general: str = ""
    """General text, as in polybit allocate, with commas."""
    budget: float = 3.5
    """Bits per weight of the plan, scales and zero points counted."""
    beta: float = 0.7
    """Weight of the tasks against the general text, 0 to 1."""
    sensitivity: How = field(default="gradient", metadata={"help": f"How needs are read: {described(SIGNALS)}."})
    ranked_by: Layerwise = "gptq"
    """Quantizer the needs are read with, as in polybit allocate --method; rtn is faster."""
    task_items: int = 32
    """Questions of each task to read needs on."""
    planned_by: str = "gptq"
    """Quantizers that make codes of the plan, with commas."""
    mix: str | None = None
    """Mixture of texts the plan's codes are calibrated on, as in polybit quantize (default: --calibration)."""
    mix_samples: int | None = None
    """Windows drawn from the mixture (default: --samples)."""
    uniform: str = "rtn,hqq,gptq,awq"
    """Quantizers of even bits, with commas."""
    uniform_bits: int = 4
    """Their width."""

    def __post_init__(self) -> None:
        for flag, names in (("--uniform", self.uniform), ("--planned-by", self.planned_by)):
            for name in names_of(names):
                pick({one: QUANTIZERS[one] for one in FIXED}, name, flag)
        check_width("w", self.uniform_bits)
        at_least(self, task_items=1)
        if self.mix_samples is not None:
            at_least(self, mix_samples=1)


@dataclass(frozen=True, kw_only=True)
class StudyOptions(BitsOptions, ConversationOptions, SwitchableOptions):
    """Which question about a model is asked, and at what size."""

    out: Path
    """Directory of all runs and of the page."""
    question: QuestionName = field(default="switchable", metadata={"help": f"What is asked: {described(STUDIES)}."})
    steps: int | None = field(default=None, metadata={"help": f"Gradient steps of a run ({defaults('steps')})."})
    batch: int | None = field(default=None, metadata={"help": f"Rows per step ({defaults('batch')})."})
    learning_rate: float | None = field(
        default=None, metadata={"help": f"Peak learning rate ({defaults('learning_rate')})."}
    )
    group_size: int | None = field(
        default=None, metadata={"help": f"Weights that share a scale, 0 = a row ({defaults('group_size')})."}
    )
    seeds: str = "0"
    """Seeds of training, with commas."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""

    def __post_init__(self) -> None:
        pick(STUDIES, self.question, "--question")
        for name, value in STUDIES[self.question].told.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        BitsOptions.__post_init__(self)
        ConversationOptions.__post_init__(self)
        SwitchableOptions.__post_init__(self)
        at_least(self, **{name: 1 for name in ("steps", "batch") if getattr(self, name) is not None})
        seeds_of(self.seeds)

    def told(self, *names: str) -> dict[str, Any]:
        """Some settings, for the options of another act."""
        return {name: getattr(self, name) for name in names}
