"""From logits to a token: penalties, bias, grammar, temperature, cuts, the draw; one row at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from polybit.serve.request import Chosen, Constraint, Sampling

UNLIKELY = float("-inf")
LEAST = 1e-30


class Sampler:
    """Draws the tokens of one answer; the same seed draws the same answer."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], constraint: Constraint | None = None) -> None:
        self.sampling, self.constraint = sampling, constraint
        self.counts: Counter[int] = Counter()
        self.prompt = torch.tensor(sorted(set(prompt)))
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self.finished = False  # the grammar allows nothing more

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.sampling.temperature == 0

    def draw(self, logits_V: Tensor, logprobs: int | None = None) -> Chosen:
        """Choose a token and note it for what comes next."""
        scores_V, (best, lead) = self.adjusted(logits_V), leader(logits_V)
        if not self.greedy:
            token = self.sample(scores_V)
        elif scores_V is logits_V:
            token = best
        else:
            token = leader(scores_V)[0]
        self.counts[token] += 1
        if self.constraint is not None:
            self.finished = self.constraint.take(token)
        return describe(logits_V, token, lead, logprobs)

    def adjusted(self, logits_V: Tensor) -> Tensor:
        """Logits after penalties, bias and grammar."""
        s = self.sampling
        mask_V = None if self.constraint is None else self.constraint.mask()
        plain = s.repetition == 1 and not s.presence and not s.frequency and not s.bias
        if plain and mask_V is None:
            return logits_V
        scores_V = logits_V.clone()
        if s.repetition != 1:
            seen = torch.cat([self.prompt, torch.tensor(list(self.counts), dtype=torch.int64)]).unique()
            values = scores_V[seen]
            scores_V[seen] = torch.where(values > 0, values / s.repetition, values * s.repetition)
        if self.counts and (s.presence or s.frequency):
            tokens, counts = torch.tensor(list(self.counts)), torch.tensor(list(self.counts.values()))
            scores_V[tokens] -= s.presence + s.frequency * counts
        add_bias(scores_V, s.bias)
        return scores_V if mask_V is None else scores_V.masked_fill_(~mask_V, UNLIKELY)

    def sample(self, scores_V: Tensor) -> int:
        """One draw after temperature and cuts: top-k, then min-p, then top-p over what is left."""
        s = self.sampling
        if 0 < s.top_k < len(scores_V):
            scores_V = scores_V.masked_fill(scores_V < scores_V.topk(s.top_k).values[-1], UNLIKELY)
        # of the likeliest; nothing overflows, and what float32 holds of the temperature is not 0
        share_V = ((scores_V - scores_V.max()) / max(s.temperature, LEAST)).exp_()
        if s.min_p > 0:
            share_V = share_V.masked_fill(share_V < s.min_p, 0.0)
        if s.top_p < 1:
            share_V = nucleus(share_V, s.top_p)
        # by hand: torch.multinomial takes 2 ms for 49,152 tokens, this 0.1
        sums_V = share_V.cumsum(0, dtype=torch.float64)
        wanted = torch.rand((), generator=self.generator, dtype=torch.float64) * sums_V[-1]
        below = sums_V[-1].nextafter(torch.zeros_like(wanted))
        return int(torch.searchsorted(sums_V, wanted.minimum(below), right=True))


def nucleus(share_V: Tensor, top_p: float) -> Tensor:
    """Shares of the likeliest tokens that make up `top_p` of all, the one that crosses the line included; else 0."""
    total = share_V.sum(dtype=torch.float64)
    # all tokens below this share have less than 1 - top_p together, so that the line lies above them: few are sorted
    [found] = (share_V >= (1 - top_p) * total / len(share_V)).nonzero(as_tuple=True)
    sorted_N, order_N = share_V[found].double().sort(descending=True, stable=True)
    before_N = sorted_N.cumsum(0) - sorted_N
    before_N[0] = -1.0  # the likeliest always stays
    kept = found[order_N[before_N < top_p * total]]
    return torch.zeros_like(share_V).index_copy_(0, kept, share_V[kept])


def add_bias(scores_V: Tensor, bias: Mapping[int, float]) -> None:
    """Add nats to single tokens, in place."""
    for token, nats in bias.items():
        scores_V[token] += nats


def describe(logits_V: Tensor, token: int, lead: float, logprobs: int | None) -> Chosen:
    """A token with the model's own log-probabilities, before anything was adjusted, as OpenAI reports them.

    lead: of the likeliest token over the second, in nats.
    """
    if logprobs is None:
        return Chosen(token, 0.0, (), lead)
    logp_V = logits_V.float().log_softmax(-1)
    best = logp_V.topk(min(logprobs, len(logp_V))) if logprobs else None
    top = () if best is None else tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Chosen(token, float(logp_V[token]), top, lead)


def lead_of(logits_V: Tensor) -> float:
    """By how many nats the likeliest token leads the second."""
    return leader(logits_V)[1]


def leader(logits_V: Tensor) -> tuple[int, float]:
    """The first of the largest, and by how many nats it leads the second; topk takes ten times as long, torch's own
    maxima four times."""
    row = logits_V.numpy()
    best = int(row.argmax())
    second = max(part.max(initial=UNLIKELY) for part in (row[:best], row[best + 1 :]))
    return best, float(row[best] - second) if len(row) > 1 else 0.0
