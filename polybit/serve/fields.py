"""What the bodies of requests have in common: fields with limits, and fields that are refused by name when unknown."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from polybit.serve.request import Sampling
from polybit.serve.service import Precise

MOST_STOPS, MOST_STOP, MOST_BIAS, MOST_CHOICES, MOST_MESSAGES, MOST_TOOLS = 16, 256, 1024, 16, 4096, 128
MOST_TEXT = 4 << 20  # characters of one text
MOST_NUMBER = 2**31 - 1

Text = Annotated[str, Field(max_length=MOST_TEXT)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
Width = Annotated[str, Field(min_length=1, max_length=64)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=MOST_NUMBER)]
Stop = (
    Annotated[str, Field(min_length=1, max_length=MOST_STOP)]
    | Annotated[list[Annotated[str, Field(min_length=1, max_length=MOST_STOP)]], Field(max_length=MOST_STOPS)]
)
Temperature = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]


class Strict(BaseModel):
    """A body or a part of one: what is not listed is refused, and no value is silently turned into another kind."""

    model_config = ConfigDict(extra="forbid", strict=True)


class PrecisionObject(Strict):
    """The precision of the parts of an answer; see the documentation of the server."""

    width: Width | None = None
    prefill: Width | None = None
    draft: Width | None = None
    drafts: Annotated[int, Field(ge=1, le=16)] = 3
    lookup: Annotated[int, Field(ge=0, le=16)] = 0
    gate: Width | None = None
    margin: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def ways_agree(self) -> PrecisionObject:
        """Drafts keep the answer as it is, a gate changes it; a number is refused where nothing would use it."""
        if self.margin is not None and self.gate is None:
            raise ValueError("margin needs gate")
        if "drafts" in self.model_fields_set and self.draft is None and not self.lookup:
            raise ValueError("drafts needs draft or lookup")
        if self.gate is not None and (self.draft is not None or self.lookup):
            raise ValueError("gate excludes draft and lookup: give one of them")
        return self


class Common(Strict):
    """Fields of every request for an answer that are spelled alike in all APIs."""

    model: Name
    stream: bool = False
    temperature: Temperature | None = None
    top_p: Share | None = None
    precision: Width | PrecisionObject | None = None

    def precise(self) -> Precise:
        """The precision fields."""
        given = self.precision
        if isinstance(given, PrecisionObject):
            return Precise(
                given.width,
                given.prefill,
                given.draft,
                given.drafts,
                given.lookup,
                given.gate,
                given.margin,
            )
        return Precise(given)


class Sampled(Common):
    """Sampling fields of OpenAI's completions, and those that llama.cpp and vLLM add."""

    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MOST_NUMBER)] | None = None
    min_p: Share | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10, allow_inf_nan=False)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]], Field(max_length=MOST_BIAS)]
        | None
    ) = None
    stop: Stop | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    user: Annotated[str, Field(max_length=512)] | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def options_of_streams(self) -> Sampled:
        """stream_options without stream would be ignored: refused instead."""
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self

    def sampling(self, vocabulary: int) -> Sampling:
        """How tokens are drawn; OpenAI's defaults."""
        bias: dict[int, float] = {}
        for key, nats in (self.logit_bias or {}).items():
            if not key.isascii() or not key.isdigit() or int(key) >= vocabulary:
                raise ValueError(
                    f"logit_bias names token {key[:40]!r}: give token ids below {vocabulary}, as in GET /tokenize"
                )
            bias[int(key)] = nats
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition=self.repetition_penalty or 1.0,
            presence=self.presence_penalty or 0.0,
            frequency=self.frequency_penalty or 0.0,
            bias=bias,
            seed=None if self.seed is None else self.seed % 2**63,
        )

    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class StreamOptions(Strict):
    """What a stream tells beside its pieces."""

    include_usage: bool = False


class JsonSchema(Strict):
    """OpenAI's wrapping of a schema."""

    name: Annotated[str, Field(max_length=128)] = "answer"
    description: Text | None = None
    schema_: Annotated[Any, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def schema_is_there(self) -> ResponseFormat:
        """A form that is asked for is kept to, or refused."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("type json_schema and the field json_schema go together")
        if self.json_schema is not None and self.json_schema.schema_ is None:
            raise ValueError("json_schema.schema is missing")
        return self


class Function(Strict):
    """A function the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[a-zA-Z0-9_.-]+$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """OpenAI's wrapping of a function."""

    type: Literal["function"]
    function: Function


class NamedFunction(Strict):
    """The function that must be called."""

    name: Annotated[str, Field(max_length=64)]


class ToolChoice(Strict):
    """OpenAI's wrapping of that."""

    type: Literal["function"]
    function: NamedFunction


class CallFunction(Strict):
    """A call as it stands in an assistant's turn."""

    name: Annotated[str, Field(max_length=64)]
    arguments: Text


class CallTurn(Strict):
    """OpenAI's wrapping of a call."""

    id: Annotated[str, Field(max_length=128)]
    type: Literal["function"] = "function"
    function: CallFunction


class TextPart(Strict):
    """A part of a message; only text can be read."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """A turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=256)] | None = None
    name: Annotated[str, Field(max_length=128)] | None = None
    tool_calls: Annotated[list[CallTurn], Field(max_length=MOST_TOOLS)] | None = None
    tool_call_id: Annotated[str, Field(max_length=128)] | None = None

    @model_validator(mode="after")
    def says_something(self) -> Message:
        """Only an assistant that calls tools may say nothing."""
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls belong to the assistant")
        return self

    def text(self) -> str:
        """What is said, parts joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())

    def to_template(self) -> dict[str, Any]:
        """The turn as chat templates know it."""
        turn: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.text()}
        if self.tool_calls:
            turn["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        for key in ("name", "tool_call_id"):
            if getattr(self, key) is not None:
                turn[key] = getattr(self, key)
        return turn


class ChatBody(Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(min_length=1, max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None

    @model_validator(mode="after")
    def fields_agree(self) -> ChatBody:
        """Fields that only make sense together."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are two names of one thing: give one")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, ToolChoice):
            names = [tool.function.name for tool in self.tools or ()]
            if self.tool_choice.function.name not in names:
                raise ValueError(f"tool_choice names a function that is not in tools: choose {', '.join(names)}")
        if self.tools and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("tools and response_format exclude each other")
        return self


Tokens = Annotated[list[Annotated[int, Field(ge=0, le=MOST_NUMBER)]], Field(min_length=1, max_length=1 << 20)]


class CompletionBody(Sampled):
    """POST /v1/completions."""

    prompt: Text | Tokens | Annotated[list[Text | Tokens], Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=0, le=MOST_NUMBER)] = 16
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool = False
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def fields_agree(self) -> CompletionBody:
        """Fields that only make sense together."""
        if self.echo and self.stream:
            raise ValueError("echo and stream exclude each other")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 needs echo: there would be no answer")
        return self


class TokenizeBody(Strict):
    """POST /tokenize."""

    content: Text
    add_special: bool = False
    with_pieces: bool = False


class DetokenizeBody(Strict):
    """POST /detokenize."""

    tokens: Annotated[list[Annotated[int, Field(ge=0, le=MOST_NUMBER)]], Field(max_length=1 << 20)]


Sampled.model_rebuild()
ChatBody.model_rebuild()
CompletionBody.model_rebuild()
