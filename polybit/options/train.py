"""What `train` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polybit.core.parts import described, pick
from polybit.core.runtime import PolybitError
from polybit.data.table import EMBEDDED
from polybit.options.checks import Device, ProcessOptions, at_least
from polybit.train.table import LESSON_OBJECTIVES, SCHEDULES

if TYPE_CHECKING:
    Method = str
    Schedule = str
else:
    Method = Literal[tuple(LESSON_OBJECTIVES)]
    Schedule = Literal[tuple(SCHEDULES)]


@dataclass(frozen=True, kw_only=True)
class TrainOptions(ProcessOptions):
    """How to train one model at several precisions."""

    out: Path
    """Directory of the new checkpoint."""
    presets: str = "A=w8a8,B=w4a4,C=w3a4"
    """Names and precisions, with commas; a precision may also be the JSON file of a plan, as in B=plan.json."""
    data: str = EMBEDDED
    """What to train on: a file (see docs/inputs.md), a SQuAD .json, a named set or a dataset id."""
    head: Literal["lm", "span"] = "lm"
    """lm = what is learnt is written word by word; span = a head that points at the answer in the text (SQuAD), trained
    from a new one where the model has none."""
    method: Method = field(default="cdt", metadata={"help": f"Who teaches: {described(LESSON_OBJECTIVES)}."})
    schedule: Schedule = field(default="all", metadata={"help": f"Presets of a step: {described(SCHEDULES)}."})
    cycles: int = 8
    """Cycles of --schedule cyclic."""
    steps: int = 300
    """Gradient steps."""
    batch: int = 8
    """Rows per step."""
    accumulate: int = 1
    """Parts a step's rows are cut into, for memory; --processes N cuts them into N at least, and one process has the
    same losses with --accumulate N."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    length: int | None = None
    """Longest row in tokens; longer ones are left out and counted, never cut (default: the model's context, at most
    512)."""
    rows: int | None = None
    """Rows of the data to use, drawn at random (default: all; 2000 of embedded)."""
    distance: Literal["kl", "mse"] = "kl"
    """What a student is measured by against its teacher: kl of the tokens' distributions, or mse of the logits."""
    beta: float = 1.0
    """Weight of a teacher beside the data."""
    labels: float = 1.0
    """Weight of the data itself; 0 = learn from teachers alone, best for a model that knows the data already."""
    teacher: bool = True
    """The float model teaches too; --no-teacher where it has not learnt the task yet."""
    consistency: float = 0.0
    """Weight of the KL between presets."""
    alignment: float = 0.0
    """Weight of the distance of hidden states to those of the most precise preset."""
    switchability: float = 0.0
    """Weight of the distance between the presets' adapters (with --adapter lora)."""
    adversarial: float = 0.0
    """Train against moved input embeddings, by at most this share of their mean length (0.05 is much); with --schedule
    random it is random precision training. Presets are then taught by the data and the float model only."""
    balance: Literal["sum", "gradient", "project"] = "sum"
    """How gradients of the presets are put together: added, brought to equal length, or that without conflicts."""
    adapter: Literal["none", "nested", "lora"] = "none"
    """none = one code for all presets, one file; lora = the same and an adapter per preset in it, in peft's format;
    nested = low-rank updates inside the quantizer, codes of their own and a checkpoint per preset."""
    rank: int = 16
    """Rank of the adapters at the narrowest width."""
    scales: Literal["learned", "frozen", "recomputed"] = "learned"
    """Scales of the grid."""
    norms: bool = False
    """Train norms and biases too, which all presets share; helps narrow activations."""
    group_size: int = 64
    """Weights that share a scale, where MODEL is a float model."""
    reference: str | None = None
    """The float model of a polybit checkpoint (default: the one it says it was made from)."""
    held_out: int | None = None
    """Rows kept for choosing the best moment (default: a tenth, at most 200)."""
    probes: int = 5
    """How often held-out rows are read; 0 = keep the last moment."""
    slack: float = 0.02
    """Share by which a preset's held-out loss may exceed its start before a moment is refused."""
    device: Device = "auto"
    """Where to train; auto = a GPU where there is one."""
    seed: int = 0
    """Seed of everything that is drawn."""
    overwrite: bool = False
    """Replace an existing checkpoint at --out."""
    restart: bool = False
    """Forget what an interrupted run has finished instead of going on from there."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, steps=1, batch=1, accumulate=1, rank=1, probes=0, cycles=1)
        if self.batch % self.accumulate:
            raise PolybitError(f"--accumulate {self.accumulate} does not divide --batch {self.batch}: choose a divisor")
        objective = pick(LESSON_OBJECTIVES, self.method, "--method")
        schedule = pick(SCHEDULES, self.schedule, "--schedule")
        if not self.labels and not objective.taught:
            raise PolybitError(
                f"--method {self.method} learns from the data alone: leave --labels 0 out, or choose another method"
            )
        if self.switchability and self.adapter != "lora":
            raise PolybitError("--switchability compares the presets' adapters: give --adapter lora with it")
        if schedule.cycles and self.steps < self.cycles:
            raise PolybitError(
                f"a cycle of --cycles {self.cycles} is longer than the run: give --steps {self.steps} or fewer"
            )
        self._check_head()

    def _check_head(self) -> None:
        """What belongs to one head, and what excludes each other."""
        among = self.consistency or self.alignment or self.switchability
        if self.head == "span":
            if self.norms:
                raise PolybitError("--norms belongs to --head lm: leave it out")
            if among:
                raise PolybitError("--consistency, --alignment and --switchability belong to --head lm: leave them out")
            if self.data != EMBEDDED and Path(self.data).suffix != ".json":
                raise PolybitError(f"--data {self.data} with --head span: give a SQuAD .json file, or embedded")
        elif self.adversarial and among:
            raise PolybitError(
                "--adversarial attacks presets one by one: leave consistency, alignment, switchability out"
            )
