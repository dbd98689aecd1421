"""From the body of a request to requests of the engine: prompt, precision, form of the answer, tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from polybit.core.runtime import PolybitError
from polybit.serve import tools as calls
from polybit.serve.fields import ResponseFormat
from polybit.serve.grammar import ANY_OBJECT
from polybit.serve.request import Constraint, Request, Sampling
from polybit.serve.service import Precise, ReadAs, Service


@dataclass(frozen=True, slots=True)
class Tools:
    """Functions of a request. forced: the answer must be a call, of `named` if given · single: one call at most."""

    functions: tuple[Mapping[str, Any], ...]
    forced: bool = False
    named: str | None = None
    single: bool = False

    @property
    def names(self) -> list[str]:
        """Names of all functions."""
        return [function["name"] for function in self.functions]

    @property
    def callable_now(self) -> list[Mapping[str, Any]]:
        """Those the answer may call."""
        return [f for f in self.functions if self.named in (None, f["name"])]


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request on its way to the engine: what is common to its `n` answers, how it is read, which tools it has."""

    request: Request
    read_as: ReadAs
    constraint: Callable[[], Constraint] | None = None
    tools: Tools | None = None

    def requests(self, count: int) -> Iterator[Request]:
        """It `count` times, with a seed and a grammar of its own each."""
        sampling = self.request.sampling
        for number in range(count):
            seed = None if sampling.seed is None else (sampling.seed + number) % 2**63
            made = None if self.constraint is None else self.constraint()
            yield replace(self.request, sampling=replace(sampling, seed=seed), constraint=made)


def chat_prompt(service: Service, messages: Sequence[Mapping[str, Any]], tools: Tools | None) -> tuple[int, ...]:
    """Token ids of a chat, its tools told by the template where it knows tools."""
    if tools is None:
        return service.chat_tokens(list(map(readable(service), messages)))
    wrapped = [{"type": "function", "function": dict(function)} for function in tools.functions]
    if service.templates.takes("tools"):
        return service.chat_tokens(messages, tools=wrapped)
    return service.chat_tokens(calls.with_tools(messages, wrapped))


def readable(service: Service) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Turns with calls as the template can write them."""
    knows = service.templates.takes("tool")
    return lambda turn: dict(turn) if knows else calls.plain_turn(turn)


def prepare(
    service: Service,
    model: str,
    precise: Precise,
    tokens: tuple[int, ...],
    sampling: Sampling,
    *,
    most: int | None,
    where: str = "max_tokens",
    stop: tuple[str, ...] = (),
    logprobs: int | None = None,
    echo: bool = False,
    form: ResponseFormat | None = None,
    tools: Tools | None = None,
) -> PreparedRequest:
    """Everything checked that can be before the engine is asked."""
    read_as = service.chosen(model, precise, tokens)
    request = Request(
        tokens=tokens,
        decoding=read_as.decoding,
        sampling=sampling,
        max_tokens=service.answer_room(tokens, most, where),
        ends=service.ends,
        stop=stop,
        logprobs=logprobs,
        echo=echo,
    )
    return PreparedRequest(request, read_as, constraint_of(service, form, tools), tools)


def constraint_of(
    service: Service, form: ResponseFormat | None, tools: Tools | None
) -> Callable[[], Constraint] | None:
    """What makes the grammar of each answer; the first one is made at once, so that a bad schema is refused."""
    if tools is not None and tools.forced:
        schema, where = calls.call_schema(tools.callable_now), "tools"
    elif tools is not None and any(function.get("strict") for function in tools.functions):
        return service.grammars.calls_within(
            (calls.OPEN, calls.CLOSE), calls.call_schema(tools.functions), "tools"
        ).copy
    elif form is None or form.type == "text":
        return None
    else:
        schema = ANY_OBJECT if form.json_schema is None else form.json_schema.schema_
        where = "response_format"
    return service.grammars.json_schema(schema, where).copy


def tools_of(
    functions: Sequence[Mapping[str, Any]] | None, choice: str | None, named: str | None, *, parallel: bool | None
) -> Tools | None:
    """The tools of a request; none where they are not to be used."""
    if not functions or choice == "none":
        return None
    names = [function["name"] for function in functions]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PolybitError(f"tools names function {twice[0]!r} twice: name each once")
    return Tools(tuple(functions), choice == "required" or named is not None, named, parallel is False)
