"""Continuous batching over resident planes: requests of all precisions, admitted as places become free, step by step.

    engine = Engine(runner, tokenizer)
    answer = engine.submit(Request(tokens=..., decoding=Decoding(precision="w4")))
    while engine.tick(): ...            # or engine.start(), a thread that does so
    answer.events                       # Piece, Piece, ..., Done

One tick reads, for every running answer, its next token – or drafts and their verification – and for those whose prompt
is not read yet a part of it. A request's tokens are those it would get alone (runners.Runner).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from polybit.core.runtime import PolybitError
from polybit.hub.rows import TokenRows
from polybit.serve.answering import Answering, Carrier, Event
from polybit.serve.drafting import Lookup, draft, learn
from polybit.serve.pace import Pace
from polybit.serve.request import Chosen, Done, Piece, Reason, Request, Spent
from polybit.serve.runners import Runner
from polybit.serve.sampling import Sampler, describe, lead_of
from polybit.serve.slots import Slots
from polybit.serve.writing import Writer

CHUNK = 256  # tokens of prompts read per tick, so that running answers do not wait for long ones


class Busy(PolybitError):
    """The queue is full."""


class Closing(PolybitError):
    """The server takes no new requests."""


class Engine:
    """Answers requests over one model; `tick` does a step of everything, `start` runs ticks in a thread.

    queue: requests that may wait for a place · chunk: tokens of prompts read per tick · threads: of the thread that
    `start` starts; None = as many as torch has.
    """

    def __init__(
        self, runner: Runner, tokenizer: Any, *, queue: int = 64, chunk: int = CHUNK, threads: int | None = None
    ) -> None:
        self.threads = threads
        self.runner, self.tokenizer, self.queue, self.chunk = runner, tokenizer, queue, chunk
        self.slots = Slots(runner.slots)
        self.waiting: deque[Answering] = deque()
        self.running: list[Answering] = []
        self.changed = threading.Condition()
        self.closing = False
        self.thread: threading.Thread | None = None
        self.steps = self.rows = 0  # of the model, for the metrics
        self.mails: list[Carrier] = []  # told when all events of a tick are
        self.pace = Pace()

    # requests ---------------------------------------------------------------------------------------------------

    def submit(self, asked: Request, hear: Callable[[Event], None]) -> Answering:
        """Queue a request. Raises Busy, Closing, or PolybitError for what cannot be answered."""
        if not asked.tokens:
            raise PolybitError("the prompt has no tokens: give at least one")
        if len(asked.tokens) >= self.runner.room:
            raise PolybitError(
                f"the prompt has {len(asked.tokens)} tokens, and the server reads {self.runner.room} with the answer: "
                f"give at most {self.runner.room - 1}"
            )
        answer = Answering(
            asked,
            hear,
            Sampler(asked.sampling, asked.tokens, asked.constraint),
            Writer(self.tokenizer, asked.tokens, asked.stop),
            Spent(prompt=len(asked.tokens)),
            perf_counter(),
            tokens=list(asked.tokens),
            lookup=Lookup(asked.decoding.lookup),
        )
        with self.changed:
            if self.closing:
                raise Closing("the server is shutting down: ask again later")
            if len(self.waiting) >= self.queue + self.slots.free:
                raise Busy(f"{len(self.waiting)} requests are waiting already: ask again later")
            self.waiting.append(answer)
            self.changed.notify_all()
        return answer

    def cancel(self, answer: Answering) -> None:
        """Stop answering; the place is free after the running step."""
        with self.changed:
            answer.cancelled = True
            self.changed.notify_all()

    # the loop ---------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Run ticks in a thread until `close`."""
        self.thread = threading.Thread(target=self.loop, name="polybit-engine", daemon=True)
        self.thread.start()

    def loop(self) -> None:
        """Tick while there is work, wait while there is none."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        while True:
            with self.changed:
                while not (self.waiting or self.running or self.closing):
                    self.changed.wait()
                if self.closing and not (self.waiting or self.running):
                    return
            self.tick()

    def close(self, timeout: float | None = None) -> bool:
        """Take no new requests, finish the running ones; after `timeout` seconds cancel what is left."""
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        if self.thread is None:
            return True
        self.thread.join(timeout)
        if self.thread.is_alive():
            with self.changed:
                for answer in [*self.waiting, *self.running]:
                    answer.cancelled = True
                self.changed.notify_all()
            self.thread.join(timeout)
        return not self.thread.is_alive()

    def tick(self) -> bool:
        """One step of everything that runs; whether anything is left to do."""
        self.drop_cancelled()
        self.admit()
        answers = list(self.running)
        if answers:
            try:
                self.step(answers)
            except Exception:  # one of them must not take the others with it: each by itself
                for answer in answers:
                    self.step_alone(answer)
        for mail in self.mails:
            mail.send()
        return bool(self.running or self.waiting)

    def step_alone(self, answer: Answering) -> None:
        """A step of one answer; what fails ends it."""
        if answer.done is not None:
            return
        answer.drafts = []
        try:
            if answer.read >= len(answer.tokens):  # read, and nothing chosen from it
                self.note_read(answer, len(answer.tokens) - 1)
            self.step([answer])
        except Exception as error:
            self.fail(answer, error)

    def drop_cancelled(self) -> None:
        """Let go of answers nobody waits for."""
        with self.changed:
            gone = [answer for answer in self.waiting if answer.cancelled]
            self.waiting = deque(answer for answer in self.waiting if not answer.cancelled)
        for answer in [*gone, *(answer for answer in self.running if answer.cancelled)]:
            self.end(answer, "cancelled")

    def admit(self) -> None:
        """Give waiting requests the places that are free."""
        while True:
            with self.changed:
                if not self.waiting:
                    return
                answer = self.waiting[0]
                # what is echoed must be read, so that it shares no beginning
                key = object() if answer.asked.echo else answer.asked.decoding.cache_key
                exact = self.runner.exact(answer.asked.decoding.precision)
                taken = self.slots.take(answer.asked.tokens, key, copies=exact, step=1 if exact else self.chunk)
                if taken is None:
                    return
                self.waiting.popleft()
                self.running.append(answer)
            answer.slot, answer.read, answer.started = taken.slot, taken.common, perf_counter()
            answer.spent.cached = taken.common
            taken.slot.tokens = answer.tokens  # what comes is in the place too, as far as it is filled
            if taken.copy_from is not None:
                try:
                    self.runner.copy(taken.copy_from, taken.slot.index, taken.common)
                except Exception as error:
                    self.fail(answer, error)

    def fail(self, answer: Answering, error: Exception) -> None:
        """End an answer whose step failed; its place is not to be trusted."""
        if answer.done is None:
            if answer.slot is not None:
                self.slots.forget(answer.slot)
            reason: Reason = "refused" if isinstance(error, PolybitError) else "error"
            self.end(answer, reason, message=str(error) or type(error).__name__)

    # a step -----------------------------------------------------------------------------------------------------

    def step(self, answers: Sequence[Answering]) -> None:
        """Draft, then read everybody's rows, choose tokens, and decide anew what a gate wants decided."""
        writing = [answer for answer in answers if not answer.reading_prompt]
        times = self.pace.times(self.runner.setting(answer.asked.decoding.precision) for answer in writing)
        drafting = [answer for answer in writing if answer.asked.decoding.drafted]
        draft(self.runner, self.read, drafting, self.pace, times)
        began = self.pace.clock()
        left, parts, keep, readers = self.chunk, [], [], []
        for answer in answers:
            part = self.part_of(answer, left)
            if part is None:
                continue
            if answer.reading_prompt:
                left -= len(part.tokens)
            last = part.start + len(part.tokens) == len(answer.tokens) + len(answer.drafts)
            parts.append(part)
            echoes = answer.asked.echo and answer.reading_prompt
            keep.append(len(part.tokens) if echoes else 1 + len(answer.drafts) if last else 0)
            readers.append(answer)
        thin = []
        for answer, part, logits_nV in zip(readers, parts, self.read(parts, keep), strict=True):
            self.note_read(answer, part.start + len(part.tokens) - len(answer.drafts))
            if answer.asked.echo and part.start < len(answer.asked.tokens):
                logits_nV = self.echo(answer, part, logits_nV)
            if not len(logits_nV):
                continue
            if self.is_thin(answer, logits_nV):
                thin.append(answer)
            else:
                self.choose(answer, logits_nV)
        self.decide_anew(thin)
        if drafting and len(writing) == len(answers):
            times.note(len(answers), sum(len(part.tokens) for part in parts), self.pace.clock() - began)

    def read(self, parts: Sequence[TokenRows], keep: Sequence[int]) -> list[Tensor]:
        """The model's step, counted."""
        if not parts:
            return []
        self.steps += 1
        self.rows += sum(len(part.tokens) for part in parts)
        return self.runner.read(parts, keep)

    def echo(self, answer: Answering, part: TokenRows, logits_TV: Tensor) -> Tensor:
        """Note what the prompt's own tokens were worth; the logits [n, V] that are left to choose from."""
        prompt = answer.asked.tokens
        following = prompt[part.start + 1 : part.start + 1 + len(part.tokens)]
        for logits_V, token in zip(logits_TV, following, strict=False):
            answer.echoed.append(describe(logits_V, token, lead_of(logits_V), answer.asked.logprobs))
        return logits_TV[len(following) :]

    def part_of(self, answer: Answering, left: int) -> TokenRows | None:
        """The rows an answer reads next: a part of its prompt, else its newest token and drafts."""
        assert answer.slot is not None
        decoding = answer.asked.decoding
        if not answer.reading_prompt:
            setting = self.runner.setting(decoding.precision)
            return TokenRows(setting, answer.slot.index, answer.read, [*answer.tokens[answer.read :], *answer.drafts])
        size = min(left, self.chunk) if self.runner.exact(decoding.precision) else self.chunk
        if left <= 0:
            return None
        # its last token is read as the answer's tokens are: it decides the first of them
        end = len(answer.asked.tokens) - decoding.mixed
        if answer.read >= end:
            return TokenRows(
                self.runner.setting(decoding.precision), answer.slot.index, answer.read, answer.tokens[answer.read :]
            )
        setting = self.runner.setting(decoding.reads_prompt)
        return TokenRows(
            setting, answer.slot.index, answer.read, answer.tokens[answer.read : min(end, answer.read + size)]
        )

    def is_thin(self, answer: Answering, logits_nV: Tensor) -> bool:
        """Whether the lead of the likeliest token is too thin to be decided at this precision."""
        decoding = answer.asked.decoding
        if decoding.gate is None or decoding.drafted:
            return False
        return lead_of(logits_nV[-1]) < decoding.margin

    def decide_anew(self, answers: Sequence[Answering]) -> None:
        """Read what came since the last gate at the gate's precision, all in one step, and choose from that."""
        parts = []
        for answer in answers:
            gate = answer.asked.decoding.gate
            assert answer.slot is not None and gate is not None
            answer.spent.gated += 1
            first = answer.gated_to or len(answer.asked.tokens) - 1
            parts.append(TokenRows(self.runner.setting(gate), answer.slot.index, first, answer.tokens[first:]))
            answer.gated_to = len(answer.tokens)
        for answer, logits_1V in zip(answers, self.read(parts, [1] * len(parts)), strict=True):
            self.choose(answer, logits_1V)

    def choose(self, answer: Answering, logits_nV: Tensor) -> None:
        """Take a token from each row of logits while the drafts foretold it; tell what is certain of the text."""
        if not answer.answering:
            answer.answering = perf_counter()
            answer.spent.prompt_ms = 1e3 * (answer.answering - answer.started)
        drafts, answer.drafts = answer.drafts, []
        if not answer.asked.max_tokens:
            self.end(answer, "length")
            return
        chosen: list[Chosen] = []
        text = ""
        reason: Reason | None = None
        for place, logits_V in enumerate(logits_nV):
            picked = answer.sampler.draw(logits_V, answer.asked.logprobs)
            answer.tokens.append(picked.token)
            chosen.append(picked)
            ended = picked.token in answer.asked.ends
            text += "" if ended else answer.writer.add(picked.token)
            reason = self.why_end(answer, ended)
            if reason is not None or place >= len(drafts):
                break
            if drafts[place] != picked.token:
                break
            self.count_accepted(answer, place)
        learn(answer, [one.token for one in chosen])
        # rows of drafts that were not taken are overwritten by what comes
        self.note_read(answer, len(answer.tokens) - 1)
        answer.spent.answer = answer.count
        if reason is not None:
            text += answer.writer.finish()
        answer.hear(Piece(text, tuple(chosen)))
        if reason is not None:
            self.end(answer, reason)

    def note_read(self, answer: Answering, count: int) -> None:
        """So many tokens of prompt and answer have keys and values that stay."""
        assert answer.slot is not None
        answer.read = count
        # what is not read as a prompt would be is not for others
        answer.slot.filled = min(count, len(answer.asked.tokens) - 1) if answer.asked.decoding.mixed else count

    def count_accepted(self, answer: Answering, place: int) -> None:
        """One more draft accepted at its position."""
        counts = answer.spent.accepted
        counts += [0] * (place + 1 - len(counts))
        counts[place] += 1

    def why_end(self, answer: Answering, ended: bool) -> Reason | None:
        """Why the answer ends with its newest token; None when it goes on."""
        if ended or answer.writer.stopped_by is not None or answer.sampler.finished:
            return "stop"
        full = len(answer.tokens) >= self.runner.room or answer.count >= answer.asked.max_tokens
        return "length" if full else None

    def end(self, answer: Answering, reason: Reason, message: str | None = None) -> None:
        """Give the place back and tell the end."""
        if answer.answering:
            answer.spent.answer_ms = 1e3 * (perf_counter() - answer.answering)
        if answer.slot is not None:
            self.slots.release(answer.slot)
        with self.changed:
            if answer in self.running:
                self.running.remove(answer)
        answer.done = Done(reason, answer.spent, answer.writer.stopped_by, message)
        answer.hear(answer.done)
