"""Anthropic's messages and its count of tokens."""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from polybit.serve import heard
from polybit.serve.asking import PreparedRequest, Tools, chat_prompt, prepare, tools_of
from polybit.serve.fields import MOST_MESSAGES, MOST_STOP, MOST_STOPS, MOST_TOOLS, Common, Count, Strict, Text
from polybit.serve.request import Done, Sampling, Spent
from polybit.serve.service import Precise, Service, Stream


class TextBlock(Strict):
    """Text of a turn."""

    type: Literal["text"]
    text: Text


class ToolUseBlock(Strict):
    """A call in an assistant's turn."""

    type: Literal["tool_use"]
    id: Annotated[str, Field(max_length=128)]
    name: Annotated[str, Field(max_length=64)]
    input: dict[str, Any]


class ToolResultBlock(Strict):
    """What a call gave, in a user's turn."""

    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(max_length=128)]
    content: Text | list[TextBlock] = ""
    is_error: bool = False

    def told(self) -> str:
        """What the model reads; templates have no word of their own for a call that failed."""
        return f"Error: {joined(self.content)}" if self.is_error else joined(self.content)


TurnBlock = Annotated[TextBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]


class AnthropicMessage(Strict):
    """A turn."""

    role: Literal["user", "assistant"]
    content: Text | Annotated[list[TurnBlock], Field(max_length=1024)]

    def to_template(self) -> list[dict[str, Any]]:
        """The turn as chat templates know it: results of calls are turns of their own."""
        if isinstance(self.content, str):
            return [{"role": self.role, "content": self.content}]
        results = [block for block in self.content if isinstance(block, ToolResultBlock)]
        turns: list[dict[str, Any]] = [
            {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.told()} for block in results
        ]
        text = "".join(block.text for block in self.content if isinstance(block, TextBlock))
        calls = [
            {"id": b.id, "type": "function", "function": {"name": b.name, "arguments": json.dumps(b.input)}}
            for b in self.content
            if isinstance(b, ToolUseBlock)
        ]
        if text or calls or not turns:
            turns.append({"role": self.role, "content": text} | ({"tool_calls": calls} if calls else {}))
        return turns


class AnthropicTool(Strict):
    """A function the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
    description: Text | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None


class AnthropicToolChoice(Strict):
    """Whether tools are to be used."""

    type: Literal["auto", "any", "tool", "none"]
    name: Annotated[str, Field(max_length=64)] | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def name_is_there(self) -> AnthropicToolChoice:
        """A named tool, and only that, has a name."""
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("type tool and the field name go together")
        return self


class CountBody(Strict):
    """POST /v1/messages/count_tokens."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    messages: Annotated[list[AnthropicMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    system: Text | list[TextBlock] | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: AnthropicToolChoice | None = None

    @model_validator(mode="after")
    def fields_agree(self) -> CountBody:
        """Fields that only make sense together."""
        choice = self.tool_choice
        if choice is not None and choice.type in ("any", "tool") and not self.tools:
            raise ValueError("tool_choice needs tools")
        names = [tool.name for tool in self.tools or ()]
        if choice is not None and choice.name is not None and choice.name not in names:
            raise ValueError(f"tool_choice names a tool that is not in tools: choose {', '.join(names)}")
        return self

    def turns(self) -> list[dict[str, Any]]:
        """The chat as templates know it."""
        first = [] if self.system is None else [{"role": "system", "content": joined(self.system)}]
        return [*first, *(turn for message in self.messages for turn in message.to_template())]

    def used_tools(self) -> Tools | None:
        """The tools the answer may use."""
        functions = [
            {"name": t.name, "description": t.description or "", "parameters": t.input_schema} for t in self.tools or ()
        ]
        choice = self.tool_choice
        kinds = {"any": "required", "none": "none"}
        if choice is None:
            return tools_of(functions, None, None, parallel=None)
        return tools_of(functions, kinds.get(choice.type), choice.name, parallel=not choice.disable_parallel_tool_use)


class MessagesBody(CountBody, Common):
    """POST /v1/messages."""

    max_tokens: Count
    temperature: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stop_sequences: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=MOST_STOP)], ...],
        Field(max_length=MOST_STOPS, strict=False),
    ] = ()
    metadata: dict[str, Any] | None = None


def joined(content: str | Sequence[TextBlock]) -> str:
    """Text blocks as one text."""
    return content if isinstance(content, str) else "".join(block.text for block in content)


def count_tokens(service: Service, body: CountBody) -> dict[str, int]:
    """Tokens of a chat; a model that is not here, or not at this width, is refused as it would be with the answer."""
    tokens = chat_prompt(service, body.turns(), body.used_tools())
    service.chosen(body.model, Precise(), tokens)
    return {"input_tokens": len(tokens)}


def ask_messages(service: Service, body: MessagesBody) -> PreparedRequest:
    """The request of a chat."""
    tools = body.used_tools()
    return prepare(
        service,
        body.model,
        body.precise(),
        chat_prompt(service, body.turns(), tools),
        Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=body.top_k or 0,
        ),
        most=body.max_tokens,
        stop=body.stop_sequences,
        tools=tools,
    )


def usage(spent: Spent) -> dict[str, int]:
    """Anthropic's usage."""
    return {
        "input_tokens": spent.prompt - spent.cached,
        "cache_read_input_tokens": spent.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": spent.answer,
    }


def ended(done: Done, calls: bool) -> dict[str, Any]:
    """Why an answer ended."""
    reason = "tool_use" if calls else "max_tokens" if done.reason == "length" else "end_turn"
    if done.stopped_by is not None and not calls:
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": done.stopped_by}


def shell(body: MessagesBody, asking: PreparedRequest) -> dict[str, Any]:
    """A message before it has content."""
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": body.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "precision": asking.read_as.to_json(),
    }


def tool_use(call: heard.ToolCall) -> dict[str, Any]:
    """A call as a content block."""
    return {
        "type": "tool_use",
        "id": f"toolu_{uuid.uuid4().hex[:24]}",
        "name": call.name,
        "input": json.loads(call.arguments),
    }


async def message(body: MessagesBody, asking: PreparedRequest, stream: Stream) -> dict[str, Any]:
    """The response that is not streamed."""
    one = await heard.whole(stream, asking.tools)
    text = one.text.strip()
    content = [{"type": "text", "text": text}] if text or not one.calls else []
    spent = one.done.spent
    more = {"content": [*content, *map(tool_use, one.calls)], "usage": usage(spent), "timings": heard.timings(spent)}
    return shell(body, asking) | more | ended(one.done, bool(one.calls))


async def message_events(body: MessagesBody, asking: PreparedRequest, stream: Stream) -> AsyncIterator[tuple[str, str]]:
    """(name, data) of the events of a streamed message."""

    def event(kind: str, **more: Any) -> tuple[str, str]:
        return kind, json.dumps({"type": kind, **more})

    before = {"input_tokens": len(asking.request.tokens), "output_tokens": 0}
    yield event("message_start", message=shell(body, asking) | {"usage": before})
    yield event("ping")
    blank = True  # no text yet, and so no block of it
    async for delta in heard.deltas(stream, asking.tools):
        text = delta.text.lstrip() if blank else delta.text
        if blank and (text or (delta.done is not None and not delta.calls)):
            blank = False
            yield event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        if text:
            yield event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})
        if delta.done is None:
            continue
        if not blank:
            yield event("content_block_stop", index=0)
        for index, call in enumerate(delta.calls, start=0 if blank else 1):
            block = tool_use(call)
            yield event("content_block_start", index=index, content_block=block | {"input": {}})
            part = {"type": "input_json_delta", "partial_json": call.arguments}
            yield event("content_block_delta", index=index, delta=part)
            yield event("content_block_stop", index=index)
        end = ended(delta.done, bool(delta.calls))
        spent = delta.done.spent
        yield event("message_delta", delta=end, usage=usage(spent), timings=heard.timings(spent))
        yield event("message_stop")
