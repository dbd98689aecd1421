"""LM: the only view an evaluation or an attack has of a model – generate, loglik, and for local models logits."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from polybit.core.precision import FLOAT
from polybit.core.runtime import PolybitError, progress, track
from polybit.data.batches import buckets, pad, same_context
from polybit.data.chat import Prompt, encode_prompt
from polybit.data.stream import encode
from polybit.hub.cache import keep_packed, logits_in_blocks, reads_in_blocks
from polybit.hub.growing import with_room
from polybit.hub.halves import in_halves
from polybit.hub.likelihood import LogLik, PairReader, TokenPair, loglik_alone
from polybit.nn import switch
from polybit.nn.board import board_of


@runtime_checkable
class LM(Protocol):
    """What every evaluation may ask of a model."""

    def generate(self, prompts: Sequence[Prompt], *, max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Greedy continuations, in the order of the prompts, cut before the first stop string."""
        ...

    def loglik(self, pairs: Sequence[tuple[str, str]], *, label: str = "log-likelihood") -> list[LogLik]:
        """Log-likelihood of each (context, continuation); label: of the progress bar."""
        ...


class LocalLM:
    """A model in this process with its tokenizer; reads the model at whatever precision it currently has.

    `batch_tokens` bounds rows x length of one forward pass, `batch_logits` the numbers in one tensor of logits.
    `keep_decoded`: inside `at`, hold the decoded weights of the preset in memory (4 bytes each) instead of decoding
    them at every step; the same numbers, faster. By default only for a model that multiplies in float
    (`switch.multiply_by`); the compiled kernels need no decoded weights.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        batch_tokens: int = 8192,
        batch_logits: int = 1 << 24,
        keep_decoded: bool | None = None,
    ):
        self.model = keep_packed(model.eval())
        self.tokenizer = tokenizer
        self.keep_decoded = keep_decoded
        self.batch_tokens, self.batch_logits = batch_tokens, batch_logits
        self.max_length = longest_input(model)
        self._forward_names = set(inspect.signature(model.forward).parameters)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    @contextmanager
    def at(self, preset: str | None) -> Iterator[LocalLM]:
        """Read the model at a preset inside the block; None leaves its precision alone."""
        if preset is None:
            yield self
            return
        keep = self.keep_decoded
        if keep is None:
            keep = any(layer.arithmetic == "float" for layer in switch.stored_layers(self.model).values())
        with switch.at(self.model, preset), switch.keep_decoded(self.model) if keep else nullcontext():
            yield self

    def end_tokens(self) -> set[int]:
        """Ids that end a generation: the tokenizer's EOS and those of the model's generation config."""
        config = getattr(self.model, "generation_config", None) or getattr(self.model, "config", None)
        value = getattr(config, "eos_token_id", None)
        values = value if isinstance(value, (list, tuple)) else [value]
        return {int(token) for token in [*values, self.tokenizer.eos_token_id] if token is not None}

    def pad_token(self) -> int:
        """Any id works as padding, because padding is masked; the tokenizer's own where it has one."""
        return self.tokenizer.pad_token_id or 0

    # logits ---------------------------------------------------------------------------------------------------

    def read_ahead(self, batches: Sequence[Tensor], presets: Sequence[str | None]) -> None:
        """Told which batches of token ids `logits` will be asked for, and at which presets; nothing to do in memory."""

    @torch.inference_mode()
    def logits(self, ids_BT: Tensor) -> Tensor:
        """Logits of a batch of windows without padding, or padded on the right, float32 [B, T, V]."""
        if self.max_length is not None and ids_BT.shape[1] > self.max_length:
            raise PolybitError(
                f"A window of {ids_BT.shape[1]} tokens is longer than the model's maximum of {self.max_length}; "
                "choose a shorter window."
            )
        return torch.cat(in_halves(lambda part: [self._logits(part)], ids_BT, self))

    def _logits(self, ids_BT: Tensor) -> Tensor:
        if block := reads_in_blocks(self.model):
            return logits_in_blocks(self.model, ids_BT.to(self.device), block).detach().float()
        return self._call(input_ids=ids_BT.to(self.device), use_cache=False).logits.detach().float()

    def rows_per_batch(self, length: int) -> int:
        """How many windows of `length` tokens fit one forward pass, counting its logits."""
        return max(1, min(self.batch_tokens // length, self.batch_logits // (length * self.vocabulary)))

    @property
    def vocabulary(self) -> int:
        """How many tokens the model can choose from."""
        return self.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]

    def _call(self, **inputs: Any) -> Any:
        """Forward with those inputs this architecture knows (not every one takes position_ids or logits_to_keep)."""
        return self.model(**{name: value for name, value in inputs.items() if name in self._forward_names})

    # generate -------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], *, max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Greedy continuations as text, without special tokens, cut before the first of the stop strings.

        A prompt that leaves no room for `max_tokens` loses its first tokens, as in lm-eval.
        """
        ids = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        answers = self.generate_tokens(ids, max_tokens=max_tokens, stop=stop)
        return [cut_at(self.decode(row, after=prompt), stop) for prompt, row in zip(ids, answers, strict=True)]

    def decode(self, ids: Sequence[int], *, after: Sequence[int] = ()) -> str:
        """Text of token ids, special tokens left out; told what they come `after`, a first blank is kept."""
        tail = list(after)[-4:]  # a few tokens are enough: some decoders drop the blank before the first of all tokens
        before = self.tokenizer.decode(tail, skip_special_tokens=True) if tail else ""
        text = self.tokenizer.decode([*tail, *ids], skip_special_tokens=True)
        if text.startswith(before):
            return text[len(before) :]
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def pieces(self, ids: Sequence[int], *, after: Sequence[int] = ()) -> list[str]:
        """The text of each token, so that joined they are the whole text; special tokens are written out."""
        special = set(self.tokenizer.all_special_ids)
        found, done = [], ""
        for end, token in enumerate(ids, start=1):
            if token in special:
                found.append(str(self.tokenizer.convert_ids_to_tokens(token)))
                continue
            text = self.decode(ids[:end], after=after)
            if text.endswith("\ufffd"):  # half a character: shown with the token that completes it
                found.append("")
                continue
            found.append(text[len(done) :])
            done = text
        return found

    def generate_tokens(
        self, prompts: Sequence[Sequence[int]], *, max_tokens: int, stop: Sequence[str] = (), label: str = "generate"
    ) -> list[list[int]]:
        """Greedy continuations as token ids, the EOS included where one ended it; the same order as the prompts.

        With stop strings a row ends soon after one appears; `generate` cuts it exactly.
        """
        if max_tokens < 1:
            raise PolybitError(f"max_tokens is {max_tokens}; ask for at least 1 token.")
        if self.max_length is not None and max_tokens >= self.max_length:
            raise PolybitError(
                f"max_tokens {max_tokens} leaves no room for a prompt in the model's maximum of {self.max_length}; "
                f"ask for at most {self.max_length - 1}."
            )
        if not all(prompts):
            raise PolybitError("A prompt has no tokens; start it with at least one token, such as BOS.")
        room = None if self.max_length is None else self.max_length - max_tokens
        kept = [list(row) if room is None else list(row)[-room:] for row in prompts]
        answers: list[list[int]] = [[] for _ in kept]
        groups = buckets([len(row) + max_tokens for row in kept], tokens=self.batch_tokens)
        for group in track(groups, label):
            said = in_halves(lambda part: self._continue(part, max_tokens, stop), [kept[i] for i in group], self)
            for index, answer in zip(group, said, strict=True):
                answers[index] = answer
        return answers

    @torch.inference_mode()
    def _continue(self, rows: Sequence[Sequence[int]], max_tokens: int, stop: Sequence[str]) -> list[list[int]]:
        """Greedy decoding of one batch, padded on the left; finished rows leave the batch when half of it is done."""
        ids_BT, mask_BT = (tensor.to(self.device) for tensor in pad(rows, self.pad_token(), side="left"))
        ends = torch.tensor(sorted(self.end_tokens()), dtype=torch.int64, device=self.device)
        active = list(range(len(rows)))  # the answer each row of the batch belongs to
        answers: list[list[int]] = [[] for _ in rows]
        done_B = torch.zeros(len(rows), dtype=torch.bool, device=self.device)
        cache = None
        for _ in range(max_tokens):
            out = self._step(ids_BT, mask_BT, cache)
            cache = with_room(getattr(out, "past_key_values", None))
            next_B = out.logits[:, -1].float().argmax(-1)
            for row, token in enumerate(next_B.tolist()):
                if not done_B[row]:
                    answers[active[row]].append(token)
            done_B |= torch.isin(next_B, ends)
            if stop:
                done_B |= self._stopped([answers[index] for index in active], stop).to(self.device)
            if bool(done_B.all()):
                break
            ids_BT = torch.cat([ids_BT, next_B[:, None]], dim=1) if cache is None else next_B[:, None]
            mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], dim=1)
            if cache is not None and int(done_B.sum()) * 2 >= len(active) and hasattr(cache, "batch_select_indices"):
                keep = (~done_B).nonzero()[:, 0]
                cache.batch_select_indices(keep)
                switch.keep_rows(self.model, keep.tolist())
                active = [active[row] for row in keep.tolist()]
                ids_BT, mask_BT, done_B = ids_BT[keep], mask_BT[keep], done_B[keep]
        return answers

    def _step(self, ids_BT: Tensor, mask_BT: Tensor, cache: Any) -> Any:
        """One forward pass: the whole prompt when there is no cache yet, else the last token."""
        positions_BT = (mask_BT.cumsum(1) - 1).clamp_min(0)[:, -ids_BT.shape[1] :]
        return self._call(
            input_ids=ids_BT,
            attention_mask=mask_BT.long(),
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def _stopped(self, answers: Sequence[Sequence[int]], stop: Sequence[str]) -> Tensor:
        """Whether a stop string appeared; only the tail is decoded, a byte is at most one token."""
        tail = max(len(text.encode()) for text in stop) + 8
        texts = (self.decode(answer[-tail:]) for answer in answers)
        return torch.tensor([any(mark in text for mark in stop) for text in texts])

    # loglik ---------------------------------------------------------------------------------------------------

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of context and continuation, split exactly where lm-eval splits them.

        Blanks at the end of the context move to the continuation; the pair is tokenized as one text and cut after as
        many tokens as the context alone has. An empty context is the BOS token, or EOS where there is none.
        """
        blanks = len(context) - len(context.rstrip())
        if context and blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        if not context:
            bos = self.tokenizer.bos_token_id
            prefix = self.tokenizer.eos_token_id if bos is None else bos
            if prefix is None:
                raise PolybitError("An empty context needs a BOS or EOS token and this tokenizer has neither.")
            ids = encode(self.tokenizer, continuation).tolist()
            return (ids[:1], ids[1:]) if ids[:1] == [prefix] else ([prefix], ids)
        whole = encode(self.tokenizer, context + continuation).tolist()
        split = len(encode(self.tokenizer, context))
        return whole[:split], whole[split:]

    def loglik(self, pairs: Sequence[tuple[str, str]], *, label: str = "log-likelihood") -> list[LogLik]:
        """Log-likelihood of each continuation after its context, with lm-eval's token boundary.

        A pair longer than the model's maximum loses the first tokens of its context; a continuation that is longer
        by itself is refused.
        """
        encoded = [self.encode_pair(context, continuation) for context, continuation in pairs]
        for (_, continuation), pair in zip(encoded, pairs, strict=True):
            if not continuation:
                raise PolybitError(f"The continuation {pair[1]!r} has no tokens; give some text to score.")
        return self.loglik_tokens(encoded, label=label)

    def loglik_tokens(self, pairs: Sequence[TokenPair], *, label: str = "log-likelihood") -> list[LogLik]:
        """Log-likelihood of each continuation after its context, both as token ids; see `loglik`.

        Pairs that follow each other with the same context (the answers of a question) read it once, and what many
        contexts begin with (worked examples) is read once for all of them.
        """
        for _, continuation in pairs:
            if self.max_length is not None and len(continuation) > self.max_length:
                raise PolybitError(
                    f"A continuation of {len(continuation)} tokens is longer than the model's maximum of "
                    f"{self.max_length}; split it."
                )
        results: list[LogLik | None] = [None] * len(pairs)
        groups = same_context(pairs) if self._shares() else []
        shared = [members for members in groups if self._fits(pairs, members)]
        with progress(label, len(pairs)) as step:
            reader = PairReader(
                self.model,
                self._call,
                self.device,
                self.pad_token(),
                self.batch_tokens,
                max(1, self.batch_logits // self.vocabulary),
                step,
            )
            said = reader.together([(pairs[m[0]][0], [pairs[n][1] for n in m]) for m in shared])
            for members, found in zip(shared, said or (), strict=False):
                for n, one in zip(members, found, strict=True):
                    results[n] = one
            left = [n for n, one in enumerate(results) if one is None]
            for n, one in zip(left, loglik_alone(self, [pairs[n] for n in left], step), strict=True):
                results[n] = one
        return [result for result in results if result is not None]

    def _fits(self, pairs: Sequence[TokenPair], members: Sequence[int]) -> bool:
        """Whether a context with its longest continuation is within the model's maximum."""
        longest = len(pairs[members[0]][0]) + max(len(pairs[n][1]) for n in members)
        return self.max_length is None or longest <= self.max_length

    def _shares(self) -> bool:
        """Whether what is read once may be gone on with: a cache that keeps it as it is, and positions that we name."""
        wanted = {"past_key_values", "position_ids", "attention_mask", "logits_to_keep"}
        widths = {
            w
            for o in (board_of(self.model).operands or {}).values()
            for w in (o.precision.q, o.precision.k, o.precision.v)
        }
        return wanted <= self._forward_names and widths <= {FLOAT}


def longest_input(model: nn.Module) -> int | None:
    """The model's maximum number of tokens by its config, None where it names none."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text before the first stop string."""
    places = [text.find(mark) for mark in stop if mark in text]
    return text[: min(places)] if places else text
