"""OpenAI's responses, without state: every request carries its whole conversation."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from polybit.serve import heard
from polybit.serve.asking import PreparedRequest, chat_prompt, prepare, tools_of
from polybit.serve.fields import MOST_MESSAGES, MOST_TOOLS, Common, Count, JsonSchema, ResponseFormat, Strict, Text
from polybit.serve.request import Sampling
from polybit.serve.service import Service, Stream
from polybit.serve.tools import ToolCall


class InputText(Strict):
    """A part of a turn."""

    type: Literal["input_text", "output_text", "text"]
    text: Text
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputTurn(Strict):
    """A turn of the conversation; one the server wrote may be sent back as it came."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[InputText], Field(max_length=256)]
    id: Annotated[str, Field(max_length=128)] | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    def to_template(self) -> dict[str, Any]:
        """The turn as chat templates know it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class InputCall(Strict):
    """A call the model made."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(max_length=128)]
    name: Annotated[str, Field(max_length=64)]
    arguments: Text
    id: Annotated[str, Field(max_length=128)] | None = None
    status: Literal["in_progress", "completed", "incomplete"] | None = None

    def to_template(self) -> dict[str, Any]:
        """The call as an assistant's turn."""
        call = {"id": self.call_id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}
        return {"role": "assistant", "content": "", "tool_calls": [call]}


class InputResult(Strict):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(max_length=128)]
    output: Text
    id: Annotated[str, Field(max_length=128)] | None = None

    def to_template(self) -> dict[str, Any]:
        """The result as a tool's turn."""
        return {"role": "tool", "tool_call_id": self.call_id, "content": self.output}


class ResponsesFormat(Strict):
    """The form of an answer, as this API wraps it."""

    type: Literal["text", "json_object", "json_schema"]
    name: Annotated[str, Field(max_length=128)] | None = None
    schema_: Annotated[Any, Field(alias="schema")] = None
    description: Text | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def schema_is_there(self) -> ResponsesFormat:
        """A form that is asked for is kept to, or refused."""
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("type json_schema and the field schema go together")
        return self

    def plain(self) -> ResponseFormat:
        """The same as chat completions wrap it."""
        if self.type != "json_schema":
            return ResponseFormat(type=self.type)
        return ResponseFormat(type=self.type, json_schema=JsonSchema.model_validate({"schema": self.schema_}))


class ResponsesText(Strict):
    """How text is written."""

    format: ResponsesFormat | None = None


class ResponsesTool(Strict):
    """A function the model may call; no other kind of tool is known."""

    type: Literal["function"]
    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponsesToolChoice(Strict):
    """The function that must be called."""

    type: Literal["function"]
    name: Annotated[str, Field(max_length=64)]


class ResponsesBody(Common):
    """POST /v1/responses."""

    input: Text | Annotated[list[InputCall | InputResult | InputTurn], Field(min_length=1, max_length=MOST_MESSAGES)]
    instructions: Text | None = None
    max_output_tokens: Count | None = None
    text: ResponsesText | None = None
    tools: Annotated[list[ResponsesTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None

    @model_validator(mode="after")
    def fields_agree(self) -> ResponsesBody:
        """Fields that only make sense together."""
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, ResponsesToolChoice):
            names = [tool.name for tool in self.tools or ()]
            if self.tool_choice.name not in names:
                raise ValueError(f"tool_choice names a function that is not in tools: choose {', '.join(names)}")
        return self


def ask_responses(service: Service, body: ResponsesBody) -> PreparedRequest:
    """The request of a conversation."""
    turns = [{"role": "system", "content": body.instructions}] if body.instructions is not None else []
    if isinstance(body.input, str):
        turns.append({"role": "user", "content": body.input})
    else:
        turns += [item.to_template() for item in body.input]
    choice = body.tool_choice
    functions = [tool.model_dump(exclude_none=True, exclude={"type"}) for tool in body.tools or ()]
    named = choice.name if isinstance(choice, ResponsesToolChoice) else None
    tools = tools_of(functions, choice if isinstance(choice, str) else None, named, parallel=body.parallel_tool_calls)
    form = body.text.format.plain() if body.text is not None and body.text.format is not None else None
    return prepare(
        service,
        body.model,
        body.precise(),
        chat_prompt(service, turns, tools),
        Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
        ),
        most=body.max_output_tokens,
        where="max_output_tokens",
        form=form,
        tools=tools,
    )


def shell(body: ResponsesBody, asking: PreparedRequest) -> dict[str, Any]:
    """A response before it has output."""
    asked = body.model_dump(include={"tool_choice", "tools"})
    return {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "model": body.model,
        "output": [],
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "tool_choice": asked["tool_choice"] or "auto",
        "tools": asked["tools"] or [],
        "precision": asking.read_as.to_json(),
    }


def text_item(text: str, identity: str, status: str = "completed") -> dict[str, Any]:
    """An assistant's turn as an output item."""
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "message", "id": identity, "role": "assistant", "status": status, "content": [part]}


def call_item(call: ToolCall) -> dict[str, Any]:
    """A call as an output item."""
    return {
        "type": "function_call",
        "id": f"fc_{uuid.uuid4().hex[:24]}",
        "call_id": f"call_{uuid.uuid4().hex[:24]}",
        "name": call.name,
        "arguments": call.arguments,
        "status": "completed",
    }


def finished(base: dict[str, Any], output: Sequence[dict[str, Any]], one: heard.Delta) -> dict[str, Any]:
    """The response once its answer has ended."""
    assert one.done is not None
    spent, cut = one.done.spent, one.done.reason == "length"
    return base | {
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": list(output),
        "usage": {
            "input_tokens": spent.prompt,
            "input_tokens_details": {"cached_tokens": spent.cached},
            "output_tokens": spent.answer,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": spent.prompt + spent.answer,
        },
        "timings": heard.timings(spent),
    }


async def response(body: ResponsesBody, asking: PreparedRequest, stream: Stream) -> dict[str, Any]:
    """The response that is not streamed."""
    one = await heard.whole(stream, asking.tools)
    text = one.text.strip()
    output = [text_item(text, f"msg_{uuid.uuid4().hex}")] if text or not one.calls else []
    end = heard.Delta(done=one.done)
    return finished(shell(body, asking), [*output, *map(call_item, one.calls)], end)


async def response_events(
    body: ResponsesBody, asking: PreparedRequest, stream: Stream
) -> AsyncIterator[tuple[str, str]]:
    """(name, data) of the events of a streamed response."""
    base, number, identity = shell(body, asking), 0, f"msg_{uuid.uuid4().hex}"

    def event(kind: str, **more: Any) -> tuple[str, str]:
        nonlocal number
        number += 1
        return kind, json.dumps({"type": kind, "sequence_number": number - 1, **more})

    place = {"item_id": identity, "output_index": 0, "content_index": 0}
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    yield event("response.created", response=base)
    yield event("response.in_progress", response=base)
    text, output, begun = "", [], False
    async for delta in heard.deltas(stream, asking.tools):
        new = delta.text if text else delta.text.lstrip()
        text += new
        if not begun and (new or (delta.done is not None and not delta.calls)):
            begun = True
            item = text_item("", identity, "in_progress") | {"content": []}
            yield event("response.output_item.added", output_index=0, item=item)
            yield event("response.content_part.added", **place, part=part)
        if new:
            yield event("response.output_text.delta", **place, delta=new, logprobs=[])
        if delta.done is None:
            continue
        if begun:
            yield event("response.output_text.done", **place, text=text, logprobs=[])
            yield event("response.content_part.done", **place, part=part | {"text": text})
            output.append(text_item(text, identity))
            yield event("response.output_item.done", output_index=0, item=output[0])
        for call in delta.calls:
            made, index = call_item(call), len(output)
            output.append(made)
            yield event("response.output_item.added", output_index=index, item=made | {"status": "in_progress"})
            told = {"item_id": made["id"], "output_index": index}
            yield event("response.function_call_arguments.delta", **told, delta=call.arguments)
            yield event("response.function_call_arguments.done", **told, name=call.name, arguments=call.arguments)
            yield event("response.output_item.done", output_index=index, item=made)
        kind = "response.incomplete" if delta.done.reason == "length" else "response.completed"
        yield event(kind, response=finished(base, output, delta))
