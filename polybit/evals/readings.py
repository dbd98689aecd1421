"""What both models said, sealed: token by token on the text, on the float model's own answers, and freely.

A metric is computed from this and runs no model any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from numpy.typing import ArrayLike

from polybit.core.records import Estimate
from polybit.evals.scoring import bootstrap
from polybit.evals.token_flip import QuantizedTokens, ReferenceTokens, first_divergence, survival


@dataclass(frozen=True, slots=True)
class PairedTokens:
    """The same tokens read by both models; arrays of equal length, see ReferenceTokens."""

    reference: ReferenceTokens
    quantized: QuantizedTokens


@dataclass(frozen=True)
class PairedAnswers:
    """Greedy answers of both models to the same prompts, as token ids."""

    prompts: Sequence[Sequence[int]] = ()
    reference: Sequence[Sequence[int]] = ()
    quantized: Sequence[Sequence[int]] = ()

    @cached_property
    def stars(self) -> list[int | None]:
        """Where each two answers part, None where they never do."""
        return [first_divergence(*pair) for pair in zip(self.reference, self.quantized, strict=True)]


@dataclass(frozen=True)
class PairedReading:
    """Everything a metric is computed from, at one preset.

    text: on the windows of text · own: teacher-forced on the float model's own answers, None without prompts · answers:
    written freely, at most `max_tokens` each · seed: of intervals.
    """

    text: PairedTokens
    own: PairedTokens | None
    answers: PairedAnswers
    max_tokens: int
    seed: int

    def mean(self, values_N: ArrayLike, paired_with: ArrayLike | None = None) -> Estimate:
        """Mean of a value per token of the text, whole windows resampled; paired: of the differences."""
        return bootstrap(values_N, paired_with=paired_with, clusters=self.text.reference.text_N, seed=self.seed)

    @cached_property
    def survival(self) -> dict[str, Any]:
        """The curve of `token_flip.survival` with its interval; empty without prompts."""
        if not self.answers.prompts:
            return {"survival": [], "survival_low": [], "survival_high": []}
        return survival(self.answers.stars, self.max_tokens, seed=self.seed)
