"""What `eval` can be told, in parts that belong together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from polybit.core.parts import listed
from polybit.core.runtime import PolybitError
from polybit.evals.table import CHOICE_FORMS, SQUAD_HEADS, SUITES, TASKS
from polybit.options.checks import Device, WorkerOptions, at_least, names_of, possible_memory, squad_is_there

WINDOWS = 64


@dataclass(frozen=True, kw_only=True)
class EvalTextOptions:
    """The comparison on text, and of free answers."""

    text: str | None = None
    """Text to measure on: a file as for --calibration or a named set (default: fresh text of the embedded generator for
    tinychat, otherwise text the reference writes itself; no text where only suites are asked for)."""
    windows: int | None = None
    """Windows of text to read (default: 64; with suites alone, giving it asks for text too)."""
    window: int | None = None
    """Tokens per window (default: 256 or 512 by the model's context)."""
    prompts: str | None = None
    """Prompts both models answer freely: a .txt (one per line) or .jsonl file, or any source of polybit pairs (default:
    beginnings of the text)."""
    answers: int = 32
    """How many prompts to answer; 0 = none."""
    max_tokens: int = 48
    """Longest free answer."""
    breakdown: bool = False
    """Ask what the first flipped token does, and what the quantized model does after it."""

    def __post_init__(self) -> None:
        at_least(self, windows=1, answers=0, max_tokens=1)


@dataclass(frozen=True, kw_only=True)
class EvalTaskOptions:
    """Tasks of the embedded generator."""

    tasks: str = ""
    """Tasks of the embedded generator, with commas: reading, arithmetic, dialogue."""
    items: int = 200
    """Questions per task."""

    def __post_init__(self) -> None:
        at_least(self, items=1)
        for name in names_of(self.tasks):
            if name not in TASKS:
                raise PolybitError(f"task {name!r} is not known: choose from {', '.join(TASKS)}")


@dataclass(frozen=True, kw_only=True)
class SquadOptions:
    """Questions of a SQuAD file."""

    squad: str | None = None
    """Questions of a SQuAD 1.1, SQuAD 2.0 or KorQuAD file to answer too, or 'embedded' for the reading task."""
    squad_items: int | None = None
    """How many of them, drawn at random (default: all)."""
    squad_head: str = "generate"
    """How they are answered: generate (free text), or span (a model with a span head; nothing else is measured)."""
    predictions: Path | None = None
    """Directory where their answers are frozen before a right one is read (default: beside --json, else a temporary
    one)."""

    def __post_init__(self) -> None:
        if self.squad_head not in SQUAD_HEADS:
            raise PolybitError(f"--squad-head {self.squad_head!r} is not known: choose {listed(SQUAD_HEADS)}")
        if self.squad is None and self.squad_head != "generate":
            raise PolybitError(f"--squad-head {self.squad_head} needs --squad FILE")
        if self.squad is not None:
            squad_is_there("--squad", self.squad)
        at_least(self, squad_items=1)


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions:
    """Multiple choice and GSM8K."""

    choices: str | None = None
    """Multiple-choice sets or GSM8K, with commas: files, MMLU's test directory, or dataset ids."""
    choice_items: int | None = None
    """Only the first so many items of each file of --choices, and of each task of --lm-eval."""
    form: str | None = None
    """How choices are asked: cloze or letters (default: letters for MMLU, cloze for the others)."""
    shots: int = 0
    """Worked examples before each item of --choices."""
    shots_from: str | None = None
    """Where the worked examples stand, one source per set of --choices, with commas."""

    def __post_init__(self) -> None:
        at_least(self, choice_items=1, shots=0)
        if self.form is not None and self.form not in CHOICE_FORMS:
            raise PolybitError(f"--form {self.form!r} is not known: choose from {', '.join(CHOICE_FORMS)}")
        sets, sources = len(names_of(self.choices)), len(names_of(self.shots_from))
        if self.shots and sources != sets:
            raise PolybitError(
                f"--shots {self.shots} needs --shots-from with one source for each set of --choices: "
                f"{sets} sets, {sources} sources"
            )


@dataclass(frozen=True, kw_only=True)
class LmEvalOptions:
    """Tasks of lm-eval."""

    lm_eval: str | None = None
    """Tasks of lm-eval, with commas; needs the extra lm-eval."""
    lm_eval_path: str | None = None
    """Directory with task files of your own for --lm-eval."""

    def __post_init__(self) -> None:
        if self.lm_eval_path is not None and not Path(self.lm_eval_path).is_dir():
            raise PolybitError(
                f"--lm-eval-path {self.lm_eval_path} is no directory: give the one your task files are in"
            )


@dataclass(frozen=True, kw_only=True)
class TalkOptions:
    """Long conversations."""

    talk: int = 0
    """Turns of long conversations in which to follow the drift of the answers; 0 = none."""
    talks: str | None = None
    """Conversations whose user messages are taken: a .jsonl of {"messages"} (default: the embedded generator)."""
    talk_count: int = 16
    """How many long conversations."""

    def __post_init__(self) -> None:
        at_least(self, talk=0, talk_count=1)


@dataclass(frozen=True, kw_only=True)
class EvalModelOptions:
    """What is compared with what."""

    reference: str | None = None
    """The float model to compare with (default: the one the checkpoint says it was made from)."""
    precision: str | None = None
    """Only these precisions, with commas, as in w4 or w8,w4a8 (default: every stored width)."""
    seed: int = 0
    """Seed of intervals and of drawn text."""
    device: Device = "auto"
    """Where models run (auto: a GPU where there is one)."""
    memory: float | None = None
    """Gigabytes of memory the run should keep to: models that are larger together are read block by block, from their
    files, for text alone (default: as this machine has)."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""

    def __post_init__(self) -> None:
        possible_memory(self.memory)


PARTS = (
    WorkerOptions,
    EvalModelOptions,
    EvalTextOptions,
    EvalTaskOptions,
    SquadOptions,
    ChoiceOptions,
    LmEvalOptions,
    TalkOptions,
)


@dataclass(frozen=True, kw_only=True)
class EvalOptions(
    TalkOptions,
    LmEvalOptions,
    ChoiceOptions,
    SquadOptions,
    EvalTaskOptions,
    EvalTextOptions,
    EvalModelOptions,
    WorkerOptions,
):
    """What to measure of a quantized model beside its float model."""

    def __post_init__(self) -> None:
        for part in PARTS:
            if hasattr(part, "__post_init__"):
                part.__post_init__(self)

    @property
    def suites(self) -> list[str]:
        """The suites that were asked for."""
        return [name for name, suite in SUITES.items() if getattr(self, suite.flag)]

    @property
    def with_text(self) -> bool:
        """Whether text is measured: where it was asked for, and where nothing else was."""
        if self.squad_head == "span":
            return False
        asked = (self.text, self.windows, self.window, self.prompts)
        needed = not self.suites or any(SUITES[name].with_text for name in self.suites)
        return needed or any(value is not None for value in asked)
