"""What comes back from the engine: the whole answer, or deltas with calls held back until they are certain."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from polybit.core.runtime import PolybitError
from polybit.serve import tools as calls
from polybit.serve.asking import Tools
from polybit.serve.request import Chosen, Done, Piece, Spent
from polybit.serve.service import Service, Stream
from polybit.serve.tools import ToolCall
from polybit.serve.writing import BROKEN


class AnswerFailed(PolybitError):
    """The engine could not finish an answer."""


class AnswerRefused(PolybitError):
    """What was asked for cannot be met, as it turned out on the way."""


@dataclass(slots=True)
class FinishedAnswer:
    """One finished answer."""

    text: str
    tokens: list[Chosen]
    done: Done
    calls: list[ToolCall] = field(default_factory=list)
    echoed: list[Chosen] = field(default_factory=list)

    @property
    def reason(self) -> str:
        """Why it ended, as OpenAI says it."""
        return "tool_calls" if self.calls else "length" if self.done.reason == "length" else "stop"


@dataclass(frozen=True, slots=True)
class Delta:
    """New text with its tokens, or calls, or the end."""

    text: str = ""
    tokens: tuple[Chosen, ...] = ()
    calls: tuple[ToolCall, ...] = ()
    done: Done | None = None


async def whole(stream: Stream, tools: Tools | None) -> FinishedAnswer:
    """The whole answer of a stream."""
    text = ""
    tokens: list[Chosen] = []
    found: list[ToolCall] = []
    async for delta in deltas(stream, tools):
        text += delta.text
        tokens += delta.tokens
        found += delta.calls
    assert stream.answer.done is not None
    return FinishedAnswer(text, tokens, stream.answer.done, found, list(stream.answer.echoed))


async def deltas(stream: Stream, tools: Tools | None) -> AsyncIterator[Delta]:
    """Text as it comes; where tools may be called, text that may be a call comes at the end, as what it is."""
    held, holding = "", tools is not None
    kept: list[Chosen] = []
    async for event in stream:
        if isinstance(event, Piece):
            held += event.text
            kept += event.tokens
            if holding and (tools is not None and (tools.forced or calls.may_be_call(held))):
                continue
            if calls.OPEN in held and tools is not None:
                holding = True
                continue
            yield Delta(held, tuple(kept))
            held, kept = "", []
            continue
        check(event)
        if held and tools is not None:
            left, found = calls.read_calls(held, tools.names, forced=tools.forced)
            yield Delta(left, tuple(kept), tuple(found[: 1 if tools.single else None]), event)
        else:
            yield Delta(held, tuple(kept), (), event)


def check(done: Done) -> None:
    """An answer that failed is an error of the server, said as one."""
    if done.reason == "refused":
        raise AnswerRefused(done.message or "the request cannot be met")
    if done.reason == "error":
        raise AnswerFailed(f"the answer could not be finished: {done.message}")
    if done.reason == "cancelled":
        raise AnswerFailed("the answer was cancelled: the server is shutting down")


def usage(spents: Sequence[Spent], each: int) -> dict[str, Any]:
    """OpenAI's usage over the answers of one request, `each` answers to a prompt."""
    prompt, answer = sum(spent.prompt for spent in spents[::each]), sum(spent.answer for spent in spents)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": sum(spent.cached for spent in spents[::each])},
    }


def timings(spent: Spent) -> dict[str, Any]:
    """llama.cpp's timings, and how drafts and gates fared."""
    read, prompt_ms, answer_ms = spent.prompt - spent.cached, spent.prompt_ms, spent.answer_ms
    found: dict[str, Any] = {
        "cache_n": spent.cached,
        "prompt_n": read,
        "prompt_ms": round(prompt_ms, 3),
        "prompt_per_second": round(1e3 * read / prompt_ms, 3) if prompt_ms else 0.0,
        "predicted_n": spent.answer,
        "predicted_ms": round(answer_ms, 3),
        "predicted_per_second": round(1e3 * max(spent.answer - 1, 0) / answer_ms, 3) if answer_ms else 0.0,
    }
    if spent.drafted:
        found |= {"draft_n": spent.drafted, "draft_n_accepted": sum(spent.accepted)}
    if spent.gated:
        found["gated_n"] = spent.gated
    return found


def chat_logprobs(service: Service, tokens: Sequence[Chosen]) -> dict[str, Any]:
    """OpenAI's log-probabilities of a chat."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        text = service.token_text(token)
        whole = list(text.encode("utf-8", "replace")) if BROKEN not in text else None  # a part of a character has none
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": whole}

    return {
        "content": [{**one(t.token, t.logprob), "top_logprobs": [one(*top) for top in t.top]} for t in tokens],
        "refusal": None,
    }
