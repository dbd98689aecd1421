"""What one request asks of the engine, and what it hears back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import Tensor

Reason = Literal["stop", "length", "cancelled", "refused", "error"]


class Constraint(Protocol):
    """Which tokens may come next, as a grammar says; it is told every token that was chosen."""

    def mask(self) -> Tensor | None:
        """True where a token is allowed, bool [V]; None = any."""
        ...

    def take(self, token: int) -> bool:
        """Note the token; True when nothing may follow it."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is drawn from its logits, in the order of the fields: penalties, bias, temperature, cuts.

    temperature: 0 = the likeliest token · top_k: 0 = all · top_p, min_p: shares of probability · repetition: factor
    above 1 for tokens of prompt and answer (CTRL, arXiv 1909.05858) · presence, frequency: nats taken from tokens of
    the answer, once or per occurrence, as OpenAI defines them · bias: nats added by token · seed: None = any.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """At which precision which part of an answer is read; every name is one that the model can be switched to.

    precision: decides the tokens · prefill: reads the prompt (default: `gate`, else `precision`) · draft: proposes
    tokens that `precision` then verifies in one step; the answer is the same as without · lookup: so many tokens or
    more that occurred before propose what followed them; 0 = never · drafts: most tokens that are proposed at a time ·
    gate: decides a token anew whose lead over the second at `precision` is less than `margin` nats, and reads what came
    since the last such token anew with it, so that it decides as if it had read everything.
    """

    precision: str
    prefill: str | None = None
    draft: str | None = None
    drafts: int = 3
    lookup: int = 0
    gate: str | None = None
    margin: float = 0.0

    @property
    def drafted(self) -> bool:
        """Whether tokens are proposed before they are verified."""
        return self.draft is not None or self.lookup > 0

    @property
    def reads_prompt(self) -> str:
        """The precision the prompt is read at, its last token left out: a gate wants it as it would read it."""
        return self.prefill or self.gate or self.precision

    @property
    def mixed(self) -> bool:
        """Whether the answer's keys and values are not those of a prompt."""
        return self.gate is not None or self.reads_prompt != self.precision

    @property
    def cache_key(self) -> str:
        """What keys and values of a prompt depend on beside its tokens: who shares it can share a beginning."""
        return self.reads_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt as token ids, and how to answer it.

    ends: tokens that end the answer · stop: texts that end it and are not part of it · logprobs: how many of the
    likeliest tokens to report beside each chosen one; None = no log-probabilities at all · echo: report the tokens of
    the prompt like those of the answer, each after what comes before it.
    """

    tokens: tuple[int, ...]
    decoding: Decoding
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int = 256
    ends: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token of the answer: its log-probability, the likeliest ones with theirs, its lead over the second in nats."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    margin: float


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of an answer and the tokens it came with; empty text while a character or a stop text is incomplete."""

    text: str
    tokens: tuple[Chosen, ...]


@dataclass(slots=True)
class Spent:
    """What an answer took: tokens, milliseconds, and how its drafts and gates fared.

    cached: tokens of the prompt that were still in the cache · accepted: drafts accepted, by position in the draft ·
    gated: tokens decided anew at the gate's precision.
    """

    prompt: int = 0
    cached: int = 0
    answer: int = 0
    prompt_ms: float = 0.0
    answer_ms: float = 0.0
    drafted: int = 0
    accepted: list[int] = field(default_factory=list)
    gated: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """The end of an answer. stopped_by: the stop text that ended it · message: what went wrong, where the request
    cannot be met (refused) or the server failed (error)."""

    reason: Reason
    spent: Spent
    stopped_by: str | None = None
    message: str | None = None
