"""The sensitivity signals and mixture criteria by name; a new one is a function in a file here and a line below."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from polybit.core.parts import load

if TYPE_CHECKING:  # the table is read where no torch is loaded
    from torch import Tensor, nn

    from polybit.measure.probe import ProbeText
    from polybit.measure.sensitivity import BlockReading, Candidates
    from polybit.nn.convert import Target


Loss = Literal["kl", "nll"]


@dataclass(frozen=True, slots=True)
class HarmSignal:
    """One way to read what quantizing each layer alone does to the model.

    Call it as `(model, probes, targets, candidates, *, calibration, only, seed, source, room) -> BlockReading of every
    block`, sums over counted tokens in `unit`; layers of blocks that are not in `only`, which is asked when the walk
    comes to a block, cost no candidates. function: dotted path of that function · summary: half a sentence for `--help`
    · backwards: blocks come from the last to the first · drawn: it draws something, so the seed decides its numbers ·
    losses: what it reads, kl or nll; what it does not read it gives the kl of.
    """

    function: str
    summary: str
    backwards: bool = False
    drawn: bool = False
    unit: str = "nats"
    losses: tuple[Loss, ...] = ("kl", "nll")

    def __call__(
        self,
        model: nn.Module,
        probes: Sequence[ProbeText],
        targets: Sequence[Target],
        candidates: Candidates,
        *,
        calibration: Sequence[Tensor] = (),
        only: Collection[int] | None = None,
        seed: int = 0,
        **where: Any,
    ) -> Iterator[BlockReading]:
        """The readings of all blocks, or of those in `only`; where: a `source` that lends weights, and a `room`."""
        return load(self.function)(
            model, probes, targets, candidates, calibration=calibration, only=only, seed=seed, **where
        )


SIGNALS: dict[str, HarmSignal] = {
    "exact": HarmSignal("polybit.measure.sensitivity:measure_layers", "quantize each layer alone and read the loss"),
    "gradient": HarmSignal(
        "polybit.measure.taylor:estimate_layers",
        "estimate from backward passes, cheaper",
        backwards=True,
        drawn=True,
        losses=("kl",),
    ),
}


@dataclass(frozen=True, slots=True)
class MixtureCriterion:
    """One idea of what makes a mixture of calibration texts good.

    function: dotted path of `(alignment_P, rank_P) -> score_P`, the best mixture has the highest score; alignment_P:
    cosine to the target's trace vector; rank_P: effective rank relative to that of the general text, None unless
    needs_rank · summary: half a sentence for `--help` · target: what a mixture should look like, the tasks' texts
    or the family of all held-out texts.
    """

    function: str
    summary: str
    target: Literal["family", "tasks"] = "tasks"
    needs_rank: bool = False

    def __call__(self, alignment_P: Tensor, rank_P: Tensor | None) -> Tensor:
        """The score of every mixture."""
        return load(self.function)(alignment_P, rank_P)


CRITERIA: dict[str, MixtureCriterion] = {
    "family": MixtureCriterion("polybit.measure.criteria:aligned", "like all held-out texts", target="family"),
    "literal": MixtureCriterion(
        "polybit.measure.criteria:aligned", "like the tasks (always pure task text, there to compare)"
    ),
    "aligned-diverse": MixtureCriterion(
        "polybit.measure.criteria:aligned_diverse", "like the tasks, and of high rank", needs_rank=True
    ),
    "rank-kept": MixtureCriterion(
        "polybit.measure.criteria:rank_kept", "like the tasks without losing rank", needs_rank=True
    ),
}
