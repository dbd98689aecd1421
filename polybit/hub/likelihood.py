"""Log-likelihood of continuations: what contexts share is read once, and only the logits that are asked for are made.

Three things are read, each after the last: the beginning that many contexts share (worked examples), the rest of each
context, and its continuations (the answers of a question). `loglik_alone` reads every pair by itself: what models are
asked with whose cache cannot be gone on with, and the slow twin.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from polybit.data.batches import buckets, pad

Tokens = Sequence[int]
TokenPair = tuple[Tokens, Tokens]  # context, continuation
SHORTEST_STEM = 16  # tokens that contexts must share before these are read by themselves
FIRST_TO_LAST = 0.75  # of a stem must be left when one more context joins those that share it


@dataclass(frozen=True, slots=True)
class LogLik:
    """Log-likelihood of a continuation: sum in nats (at most 0), number of tokens, whether greedy decoding says it."""

    total_nats: float
    n_tokens: int
    is_greedy: bool


@contextmanager
def keep_positions(model: nn.Module, keep_BT: Tensor) -> Iterator[None]:
    """While it lasts, the output head sees only the hidden states at `keep_BT`, as one row [1, N, D].

    The logits of prompts and padding, most of the memory of a step with a large vocabulary, are then never made.
    Whatever the model does to logits afterwards (a cap, a factor) it does to these.
    """
    ask: Any = model.get_output_embeddings
    kept_BT = keep_BT.bool()
    handle = ask().register_forward_pre_hook(lambda _, inputs: (inputs[0][kept_BT][None], *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def stems(contexts: Sequence[Tokens]) -> list[tuple[int, list[int]]]:
    """(tokens shared, numbers of the contexts that share them): every context once, the sharing ones side by side.

    A stem leaves at least one token of each context, whose logits are wanted. 0 tokens: nothing worth sharing.
    """
    order = sorted(range(len(contexts)), key=lambda n: list(contexts[n]))
    found: list[tuple[int, list[int]]] = []
    for n in order:
        if found:
            length, members = found[-1]
            same = common(contexts[members[0]], contexts[n], at_most=length or len(contexts[members[0]]) - 1)
            if same >= max(SHORTEST_STEM, FIRST_TO_LAST * length):
                found[-1] = (same, [*members, n])
                continue
        found.append((0, [n]))
    short = [n for length, members in found if not length for n in members]
    return [one for one in found if one[0]] + ([(0, short)] if short else [])


def common(a: Tokens, b: Tokens, *, at_most: int) -> int:
    """How many first tokens of both are the same, fewer than either has."""
    longest = min(at_most, len(a) - 1, len(b) - 1)
    return next((place for place in range(longest) if a[place] != b[place]), longest)


def repeatable(cache: Any, *, stem: bool = False) -> bool:
    """Whether rows of a cache can be repeated while the cache stays as it is; stem: also with padding behind it, which
    shifts what a sliding window sees."""
    kinds = (DynamicLayer,) if stem else (DynamicLayer, DynamicSlidingWindowLayer)
    return bool(getattr(cache, "layers", ())) and all(type(layer) in kinds for layer in cache.layers)


def rows_of(cache: Any, rows_R: Tensor) -> Any:
    """A cache of some rows of another, each as often as it is named; the other stays as it is."""
    found = copy.copy(cache)
    found.layers = [copy.copy(layer) for layer in cache.layers]
    found.batch_select_indices(rows_R)
    return found


@dataclass(frozen=True, slots=True)
class PairReader:
    """Reads pairs with one model.

    call: its forward, by keyword · fill: padding · tokens: rows x length of a pass, cached tokens among them · kept:
    logits of so many tokens at a time · step: told how many pairs are done.
    """

    model: nn.Module
    call: Callable[..., Any]
    device: torch.device
    fill: int
    tokens: int
    kept: int
    step: Callable[[int], None]

    @torch.inference_mode()
    def together(self, groups: Sequence[tuple[Tokens, Sequence[Tokens]]]) -> list[list[LogLik]] | None:
        """For each context its continuations' log-likelihoods; None where the model's cache cannot be repeated."""
        found: list[list[LogLik]] = [[] for _ in groups]
        for length, members in stems([context for context, _ in groups]):
            cache = None
            if length:
                ids_BT = torch.as_tensor(groups[members[0]][0][:length])[None].to(self.device)
                cache = self.call(input_ids=ids_BT, use_cache=True, logits_to_keep=1).past_key_values
                if not repeatable(cache, stem=True):
                    cache, length = None, 0
            sizes = [len(groups[n][0]) - length for n in members]
            for bucket in buckets([length + size for size in sizes], tokens=self.tokens, rows=self.kept):
                rows = [members[place] for place in bucket]
                part = [(groups[n][0][length:], groups[n][1]) for n in rows]
                said = self.after_stem(cache, length, part)
                if said is None:
                    return None
                for n, one in zip(rows, said, strict=True):
                    found[n] = one
                self.step(sum(map(len, said)))
        return found

    def after_stem(
        self, stem: Any, length: int, part: Sequence[tuple[Tokens, Sequence[Tokens]]]
    ) -> list[list[LogLik]] | None:
        """The same for contexts that fit one pass, `length` tokens of which are in `stem`."""
        ids_BT, own_BT = (t.to(self.device) for t in pad([rest for rest, _ in part], self.fill, side="left"))
        mask_BT = torch.cat([own_BT.new_ones(len(part), length), own_BT], dim=1)
        out = self.call(
            input_ids=ids_BT,
            attention_mask=mask_BT.long(),
            position_ids=(mask_BT.cumsum(1) - 1).clamp_min(0)[:, length:],
            past_key_values=None if stem is None else rows_of(stem, torch.zeros(len(part), dtype=torch.int64)),
            use_cache=True,
            logits_to_keep=1,
        )
        cache = out.past_key_values
        if not repeatable(cache):
            return None
        # a continuation's first token is told by its context's last one
        lines = [(row, tokens) for row, (_, said) in enumerate(part) for tokens in said]
        first_L = torch.tensor([tokens[0] for _, tokens in lines], device=self.device)
        row_L = torch.tensor([row for row, _ in lines], device=self.device)
        first_BV = out.logits[:, -1].float()
        nats_L = (first_BV[row_L, first_L] - first_BV.logsumexp(-1)[row_L]).double().cpu()
        greedy_L = (first_BV.argmax(-1)[row_L] == first_L).cpu()
        del first_BV, out
        longer = [n for n, (_, tokens) in enumerate(lines) if len(tokens) > 1]
        sizes = [mask_BT.shape[1] + len(lines[n][1]) - 1 for n in longer]
        most = max((len(lines[n][1]) - 1 for n in longer), default=1)
        for bucket in buckets(sizes, tokens=self.tokens, rows=max(1, self.kept // most)):
            chosen = [longer[place] for place in bucket]
            more_N, right_N = self.after_context(cache, mask_BT, [lines[n] for n in chosen])
            counts = torch.tensor([len(lines[n][1]) - 1 for n in chosen])
            owner_N = torch.tensor(chosen).repeat_interleave(counts)
            nats_L.index_add_(0, owner_N, more_N.double().cpu())
            wrong_L = torch.zeros(len(lines), dtype=torch.int64).index_add(0, owner_N, (~right_N).long().cpu())
            greedy_L &= wrong_L == 0
        every = iter(zip(nats_L.tolist(), (len(tokens) for _, tokens in lines), greedy_L.tolist(), strict=True))
        return [[LogLik(*next(every)) for _ in said] for _, said in part]

    def after_context(self, cache: Any, mask_BT: Tensor, lines: Sequence[tuple[int, Tokens]]) -> tuple[Tensor, Tensor]:
        """Log-probability of every token but the first of continuations of rows of a cache, line after line, and
        whether it is the likeliest, [N] each."""
        rows_R = torch.tensor([row for row, _ in lines], device=self.device)
        ids_RL, more_RL = (t.to(self.device) for t in pad([tokens[:-1] for _, tokens in lines], self.fill))
        seen_RT = mask_BT[rows_R]
        with keep_positions(self.model, more_RL):
            out = self.call(
                input_ids=ids_RL,
                attention_mask=torch.cat([seen_RT, more_RL], dim=1).long(),
                position_ids=seen_RT.sum(1)[:, None] + torch.arange(ids_RL.shape[1], device=self.device),
                past_key_values=rows_of(cache, rows_R),
                use_cache=True,
            )
        # an output head that is no module of its own is not watched, and makes all logits
        logits_NV = (out.logits[0] if out.logits.shape[:2] == (1, int(more_RL.sum())) else out.logits[more_RL]).float()
        wanted_N = torch.tensor([token for _, tokens in lines for token in tokens[1:]], device=self.device)
        logp_N = logits_NV.gather(-1, wanted_N[:, None])[:, 0] - logits_NV.logsumexp(-1)
        return logp_N, logits_NV.argmax(-1) == wanted_N


def score_row(logp_TV: Tensor, target_T: Tensor) -> LogLik:
    """The log-likelihood of tokens under the log-probabilities before each."""
    target_T = target_T.to(logp_TV.device)
    nats = float(logp_TV.gather(-1, target_T[:, None]).double().sum())
    return LogLik(nats, len(target_T), bool((logp_TV.argmax(-1) == target_T).all()))


@torch.inference_mode()
def loglik_alone(lm: Any, pairs: Sequence[TokenPair], step: Callable[[int], None]) -> list[LogLik]:
    """Each pair as a row of its own, all logits made; a pair that is too long loses its first tokens."""
    found: list[LogLik | None] = [None] * len(pairs)
    keep = None if lm.max_length is None else lm.max_length + 1
    rows = [[*context, *continuation] for context, continuation in pairs]
    rows = [row if keep is None else row[-keep:] for row in rows]
    length = max((len(row) for row in rows), default=1)
    for group in buckets([len(row) for row in rows], tokens=lm.batch_tokens, rows=lm.rows_per_batch(length)):
        ids_BT, _ = pad([rows[index] for index in group], lm.pad_token())
        logp_BTV = lm.logits(ids_BT[:, :-1]).log_softmax(-1)
        for line, index in enumerate(group):
            count = len(pairs[index][1])
            span = slice(len(rows[index]) - 1 - count, len(rows[index]) - 1)
            found[index] = score_row(logp_BTV[line, span], ids_BT[line, 1:][span])
        step(len(group))
    return [one for one in found if one is not None]
