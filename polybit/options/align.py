"""What `align` can be told, and what follows from it: the refresh, the learning rate, the names of the widths."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from polybit.core.parts import described, pick
from polybit.core.plan import PLAN
from polybit.core.precision import FLOAT, Precision
from polybit.core.runtime import PolybitError
from polybit.options.checks import Device, ProcessOptions, WorkerOptions, at_least, names_of
from polybit.options.pairs import GROUP_SIZE, MAX_TOKENS
from polybit.train.table import ANSWER_OBJECTIVES, AnswerObjective, PreferenceLoss, Share, rates

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(ANSWER_OBJECTIVES)]

RENEWALS = 10  # in a run, unless --refresh-every says otherwise


@dataclass(frozen=True, kw_only=True)
class AlignOptions(WorkerOptions, ProcessOptions):
    """What is aligned, with which answers, by which objective, and how long."""

    out: Path
    """Directory of the new checkpoint."""
    pairs: Path | None = None
    """Directory made by `polybit pairs`."""
    prompts: str | None = None
    """Instead of --pairs: prompts to make pairs of first (file, named set or dataset id)."""
    precision: str | None = None
    """Precisions to align, with commas, as in w3 or w4,w3,w2 (default: a checkpoint's widths of 4 bits and less, that
    of the pairs for a float model). All other widths of a checkpoint are kept."""
    keep_within: float = 0.005
    """Nats of KL a width that is kept may lose, or 5 % of what it has where that is more; of several aligned ones also
    those that begin within it."""
    latents: Literal["own", "shared"] = "own"
    """Of several widths in one file: own = each moves only the bits that narrower ones do not read; shared = one latent
    weight for all."""
    method: Method = field(default="kd", metadata={"help": f"What is learnt: {described(ANSWER_OBJECTIVES)}."})
    steps: int = 150
    """Gradient steps; several widths of one file take them in turn."""
    batch: int = 16
    """Prompts per step."""
    accumulate: int = 1
    """Parts a step's batch is cut into, for memory."""
    learning_rate: float | None = field(
        default=None, metadata={"help": f"Peak learning rate (default: {rates(ANSWER_OBJECTIVES)})."}
    )
    beta: float = 0.1
    """Inverse temperature of qdpo."""
    loss: PreferenceLoss = "sigmoid"
    """Preference loss."""
    nll: float = 0.0
    """Weight of the negative log-likelihood of the float answers in qdpo."""
    anchor: float = 1.0
    """Weight, in qdpo, of the nats by which a float answer is less likely than it was in float (0 = as published)."""
    gamma: float = 10.0
    """Weight of kd in qdpo+kd."""
    refresh_every: int | None = None
    """Steps after which the model's own answers are made anew (default: a tenth of the steps; 0 = never, as
    published)."""
    share: Share = "loss"
    """How several widths share the weights: sum of losses, each loss over its start, equal gradients, or without what
    works against another."""
    adapter: Literal["none", "nested"] = "none"
    """nested = train low-rank updates inside the quantizer, Q(W + BA), instead of the weights."""
    rank: int = 16
    """Rank of the adapter."""
    scales: Literal["recomputed", "learned", "frozen"] | None = None
    """Scales of the grid (default: recomputed from the weights for a float model, learned from a checkpoint)."""
    group_size: int = GROUP_SIZE
    """Weights that share a scale, where MODEL is a float model."""
    held_out: int | None = None
    """Prompts kept for choosing the best moment (default: a tenth, at most 128)."""
    probes: int = 10
    """How often held-out flips and KL are measured."""
    max_tokens: int = MAX_TOKENS
    """Longest answer, with --prompts."""
    shared_prefix: bool = False
    """Compute the common beginning of a pair once (qdpo; pays for long prompts)."""
    reference: str | None = None
    """The float model of a polybit checkpoint (default: the one it says it was made from)."""
    device: Device = "auto"
    """Where to train (auto: a GPU where there is one)."""
    seed: int = 0
    """Seed of the order of prompts."""
    overwrite: bool = False
    """Replace an existing checkpoint at --out."""
    restart: bool = False
    """Forget what an interrupted run has finished instead of going on from there."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""

    def __post_init__(self) -> None:
        WorkerOptions.__post_init__(self)
        ProcessOptions.__post_init__(self)
        if (self.pairs is None) == (self.prompts is None):
            raise PolybitError("give --pairs DIR (made by polybit pairs) or --prompts FILE, one of the two")
        at_least(self, steps=1, batch=1, accumulate=1, probes=1, max_tokens=1, rank=1)
        if self.batch % self.accumulate:
            raise PolybitError(f"--accumulate {self.accumulate} does not divide --batch {self.batch}: choose a divisor")
        if self.shared_prefix and not self.objective.prefix:
            able = ", ".join(name for name, part in ANSWER_OBJECTIVES.items() if part.prefix)
            raise PolybitError(f"--shared-prefix belongs to --method {able}, not to {self.method}: leave it out")
        if self.refresh_every is not None and self.refresh_every < 0:
            raise PolybitError(
                f"--refresh-every {self.refresh_every} is not possible: give 0 (never) or a number of steps"
            )
        _ = self.names  # refuses what cannot be aligned before anything is loaded

    @property
    def objective(self) -> AnswerObjective:
        """What the table says of the method."""
        return pick(ANSWER_OBJECTIVES, self.method, "--method")

    @property
    def names(self) -> list[str]:
        """The precisions asked for, widest first, a plan last; only weights can be aligned."""
        found = {}
        for name in names_of(self.precision):
            if name == PLAN:
                found[name] = 0
                continue
            precision = Precision.parse(name)
            if precision.w == FLOAT or precision != Precision(w=precision.w):
                raise PolybitError(
                    f"--precision {name} cannot be aligned: give weight widths w2 to w8, as in w3 or w4,w3, or plan "
                    "for a file made by one"
                )
            found[name] = precision.w
        return sorted(found, key=lambda name: -found[name])

    @property
    def narrowest(self) -> str | None:
        """The narrowest precision asked for, the one pairs are of."""
        return self.names[-1] if self.names else None

    @property
    def refresh(self) -> int:
        """Steps between renewals of the model's own answers; 0 where the objective never looks at them."""
        if not self.objective.own:
            return 0
        return max(1, self.steps // RENEWALS) if self.refresh_every is None else self.refresh_every

    @property
    def rate(self) -> float:
        """The learning rate asked for, or the objective's own."""
        if self.learning_rate is not None:
            return self.learning_rate
        static = self.objective.static_rate
        return static if static is not None and not self.refresh else self.objective.rate
