"""One model as the HTTP side sees it: names and precisions, chats to tokens, requests to streams of events."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol

from polybit.core.runtime import PolybitError
from polybit.serve.answering import Answering
from polybit.serve.engine import Engine
from polybit.serve.grammar import Grammars
from polybit.serve.policy import AutoPolicy
from polybit.serve.request import Decoding, Done, Piece, Request, Spent
from polybit.serve.templates import Templates

AUTO = "auto"
MARGIN = 0.5  # nats, of a gate that nobody fitted


class UnknownModel(PolybitError):
    """A model name the server does not answer to."""


@dataclass(frozen=True, slots=True)
class Precise:
    """The precision fields of a request, whatever API they came by; None = the server decides."""

    precision: str | None = None
    prefill: str | None = None
    draft: str | None = None
    drafts: int = 3
    lookup: int = 0
    gate: str | None = None
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class ReadAs:
    """How a request will be read, and what decided it."""

    decoding: Decoding
    by: str

    def to_json(self) -> dict[str, Any]:
        """For the response."""
        d = self.decoding
        more = {"prefill": d.prefill, "draft": d.draft, "lookup": d.lookup, "gate": d.gate, "margin": d.margin}
        return {"width": d.precision, "chosen_by": self.by, **{key: value for key, value in more.items() if value}}


class Mail:
    """Events on their way from the engine's thread to the loop: one wake-up carries all of a step."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.waiting: deque[tuple[Stream, Piece | Done]] = deque()

    @property
    def closed(self) -> bool:
        """Whether nobody reads it any more."""
        return self.loop.is_closed()

    def send(self) -> None:
        """Called from the engine's thread after every step."""
        if self.waiting:
            try:
                self.loop.call_soon_threadsafe(self.deliver)
            except RuntimeError:  # the server's loop has ended: nobody listens any more
                self.waiting.clear()

    def deliver(self) -> None:
        """Called in the loop."""
        while self.waiting:
            stream, event = self.waiting.popleft()
            stream.events.append(event)
            stream.arrived.set()


class Stream:
    """The events of one request as they come; leaving it early cancels the request.

    Text that came while its reader was busy is handed on in one piece: the more there is to do, the fewer pieces.
    """

    def __init__(self, service: Service, request: Request, by: str) -> None:
        self.by, self.heard = by, False
        self.mail = service.mail()
        self.events: deque[Piece | Done] = deque()
        self.arrived = asyncio.Event()
        self.service, self.request = service, request
        self.answer_arrived = perf_counter()
        self.answer: Answering = service.engine.submit(request, self.hear)

    def hear(self, event: Piece | Done) -> None:
        """Called from the engine's thread."""
        if not self.heard:
            self.heard = True
            self.service.first_seconds(perf_counter() - self.answer_arrived)
        if isinstance(event, Done):
            self.service.note(event.spent, self.request.decoding.precision, self.by)
        self.mail.waiting.append((self, event))

    async def __aiter__(self) -> AsyncIterator[Piece | Done]:
        try:
            while True:
                while not self.events:
                    self.arrived.clear()
                    await self.arrived.wait()
                event = self.events.popleft()
                while isinstance(event, Piece) and self.events and isinstance(self.events[0], Piece):
                    more: Any = self.events.popleft()
                    event = Piece(event.text + more.text, event.tokens + more.tokens)
                yield event
                if isinstance(event, Done):
                    return
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Stop answering, unless it has ended."""
        if self.answer.done is None:
            self.service.engine.cancel(self.answer)


class Submission(Protocol):
    """A request on its way to the engine (asking.PreparedRequest)."""

    @property
    def read_as(self) -> ReadAs:
        """How it is read."""
        ...

    def requests(self, count: int) -> Iterator[Request]:
        """It, so many times."""
        ...


@dataclass
class Service:
    """A loaded model, ready to answer.

    name: what clients call it, `name@w4` at a width · precisions: all it can be read at, the default first ·
    most_tokens: of one answer · ends: tokens that end an answer · margins: of gates, by "low:high" · notes: what
    /v1/models tells beside the name · note, first_seconds: told of every finished answer, and of the seconds to its
    first token.
    """

    name: str
    tokenizer: Any
    engine: Engine
    precisions: tuple[str, ...]
    policy: AutoPolicy
    templates: Templates
    grammars: Grammars
    ends: frozenset[int]
    most_tokens: int
    created: int = 0
    margins: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    note: Callable[[Spent, str, str], None] = lambda spent, width, by: None
    first_seconds: Callable[[float], None] = lambda seconds: None

    def __post_init__(self) -> None:
        self.before = tuple(self.tokenizer("a", add_special_tokens=False)["input_ids"][-1:])

    def mail(self) -> Mail:
        """What carries events to the loop that runs now."""
        loop = asyncio.get_running_loop()
        found = next((mail for mail in self.engine.mails if isinstance(mail, Mail) and mail.loop is loop), None)
        if found is None:
            found = Mail(loop)
            self.engine.mails = [*(mail for mail in self.engine.mails if not mail.closed), found]
        return found

    def token_text(self, token: int) -> str:
        """A token as text, with the blank it begins with, which many decoders leave out at the beginning of a text."""
        first, both = (
            self.tokenizer.decode(list(ids), skip_special_tokens=False) for ids in (self.before, (*self.before, token))
        )
        alone: str = both[len(first) :] if both.startswith(first) else self.tokenizer.decode([token])
        return alone

    @property
    def room(self) -> int:
        """Tokens of prompt and answer together."""
        return self.engine.runner.room

    @property
    def pressure(self) -> float:
        """Requests under way and waiting, per place."""
        return (len(self.engine.running) + len(self.engine.waiting)) / max(len(self.engine.slots.slots), 1)

    def names(self) -> list[str]:
        """Every model name that is answered to."""
        each = [f"{self.name}@{precision}" for precision in (*self.precisions, AUTO)]
        return [self.name, *each]

    def chosen(self, model: str, asked: Precise, tokens: Sequence[int]) -> ReadAs:
        """How a request is read: by the name's suffix or its precision field, which must not disagree."""
        base, mark, suffix = model.rpartition("@") if "@" in model else (model, "", "")
        if base != self.name:
            known = ", ".join(self.names()[:4])
            raise UnknownModel(f"there is no model {model!r:.120} here: choose {known}, ... (GET /v1/models lists all)")
        named = suffix if mark else None
        if named is not None and asked.precision is not None and named != asked.precision:
            raise PolybitError(f"model says {named!r:.40} and precision says {asked.precision!r:.40}: give one of them")
        wanted = asked.precision if named is None else named
        by = "request"
        if wanted is None:
            wanted, by = self.precisions[0], "default"
        elif wanted == AUTO:
            choice = self.policy.choose(tokens, self.pressure)
            wanted, by = choice.precision, choice.by
        parts = {"precision": wanted, "prefill": asked.prefill, "draft": asked.draft, "gate": asked.gate}
        for what, precision in parts.items():
            if precision is not None and precision not in self.precisions:
                raise PolybitError(
                    f"{what} {precision!r:.40} is not served: choose {', '.join(self.precisions)} or auto"
                )
        named_all = [precision for precision in parts.values() if precision is not None]
        apart = [p for p in named_all if self.engine.runner.exact(p) != self.engine.runner.exact(wanted)]
        if apart:
            raise PolybitError(
                f"{wanted} and {apart[0]} cannot read one answer together: one of them rounds activations, keys or "
                "values, and the other does not"
            )
        decoding = Decoding(
            precision=wanted,
            prefill=asked.prefill,
            draft=asked.draft,
            drafts=asked.drafts,
            lookup=asked.lookup,
            gate=asked.gate,
            margin=self.margin(wanted, asked) if asked.gate else 0.0,
        )
        return ReadAs(decoding, by)

    def margin(self, low: str, asked: Precise) -> float:
        """Of a gate, in nats: what was asked for, else what `polybit route` learnt for these widths, else a guess."""
        return self.margins.get(f"{low}:{asked.gate}", MARGIN) if asked.margin is None else asked.margin

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Token ids of a text; refused where it cannot be one."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise PolybitError(
                "the text holds half of a surrogate pair, which is no character: send valid Unicode"
            ) from None
        # a token takes at least a byte, usually four; what is far too long need not be cut into tokens
        if len(text) > 64 * self.room + 4096:
            raise PolybitError(f"the prompt has {len(text)} characters, far more than {self.room} tokens: shorten it")
        return tuple(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]], **values: Any) -> tuple[int, ...]:
        """Token ids of a chat by the checkpoint's template."""
        return self.encode(self.templates.render(messages, **values), special=False)

    def answer_room(self, tokens: Sequence[int], asked: int | None, where: str) -> int:
        """How many tokens an answer may have: what was asked for if there is room, else what is left."""
        left = self.room - len(tokens)
        if left < 1:
            raise PolybitError(
                f"the prompt has {len(tokens)} tokens and the server reads {self.room} with the answer: shorten the "
                f"prompt to at most {self.room - 1}"
            )
        if asked is not None and asked > self.most_tokens:
            raise PolybitError(f"{where} is {asked}: this server writes at most {self.most_tokens} tokens")
        return min(left, self.most_tokens if asked is None else asked)

    def all_streams(self, prepared: Sequence[Submission], count: int = 1) -> list[Stream]:
        """Submit every request `count` times, with a seed of its own each: all of them or none."""
        most = self.engine.queue + len(self.engine.slots.slots)
        if len(prepared) * count > most:
            raise PolybitError(
                f"prompt and n ask for {len(prepared) * count} answers: ask for at most {most} at a time"
            )
        found: list[Stream] = []
        try:
            for one in prepared:
                found += (Stream(self, request, one.read_as.by) for request in one.requests(count))
        except BaseException:
            for stream in found:
                stream.cancel()
            raise
        return found
