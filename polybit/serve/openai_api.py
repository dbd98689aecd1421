"""OpenAI's chat completions and completions."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

from polybit.serve import heard
from polybit.serve.asking import PreparedRequest, chat_prompt, prepare, tools_of
from polybit.serve.fields import ChatBody, CompletionBody, ToolChoice
from polybit.serve.heard import FinishedAnswer
from polybit.serve.request import Chosen, Spent
from polybit.serve.service import Service, Stream
from polybit.serve.tools import ToolCall


def ask_chat(service: Service, body: ChatBody) -> PreparedRequest:
    """The request of a chat."""
    choice = body.tool_choice
    named = choice.function.name if isinstance(choice, ToolChoice) else None
    functions = [tool.function.model_dump(exclude_none=True) for tool in body.tools or ()]
    tools = tools_of(functions, choice if isinstance(choice, str) else None, named, parallel=body.parallel_tool_calls)
    return prepare(
        service,
        body.model,
        body.precise(),
        chat_prompt(service, [message.to_template() for message in body.messages], tools),
        body.sampling(service.grammars.vocabulary),
        most=body.max_completion_tokens or body.max_tokens,
        stop=body.stops(),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        form=body.response_format,
        tools=tools,
    )


def head(kind: str, asking: PreparedRequest, model: str) -> dict[str, Any]:
    """What every response and every chunk begins with."""
    short = {"chat.completion": "chatcmpl", "chat.completion.chunk": "chatcmpl"}.get(kind, "cmpl")
    return {
        "id": f"{short}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "precision": asking.read_as.to_json(),
    }


async def chat(service: Service, body: ChatBody, asking: PreparedRequest, streams: Sequence[Stream]) -> dict[str, Any]:
    """The response of a chat that is not streamed."""
    wholes = await asyncio.gather(*(heard.whole(stream, asking.tools) for stream in streams))
    choices = []
    for index, one in enumerate(wholes):
        message: dict[str, Any] = {"role": "assistant", "content": one.text.strip() or ("" if not one.calls else None)}
        if one.calls:
            message["tool_calls"] = [call_json(call) for call in one.calls]
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": heard.chat_logprobs(service, one.tokens) if body.logprobs else None,
                "finish_reason": one.reason,
            }
        )
    spents = [one.done.spent for one in wholes]
    more = {"choices": choices, "usage": heard.usage(spents, body.n), "timings": heard.timings(spents[0])}
    return head("chat.completion", asking, body.model) | more


def call_json(call: ToolCall, index: int | None = None) -> dict[str, Any]:
    """A call as OpenAI writes it."""
    made = {
        "id": f"call_{uuid.uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
    return made if index is None else {"index": index, **made}


async def merged(streams: Sequence[Stream], asking: PreparedRequest) -> AsyncIterator[tuple[int, heard.Delta]]:
    """Deltas of several answers as they come, with the number of the answer."""
    if len(streams) == 1:
        async for only in heard.deltas(streams[0], asking.tools):
            yield 0, only
        return
    arrived: asyncio.Queue[tuple[int, heard.Delta | BaseException | None]] = asyncio.Queue()

    async def pump(index: int, stream: Stream) -> None:
        try:
            async for delta in heard.deltas(stream, asking.tools):
                await arrived.put((index, delta))
            await arrived.put((index, None))
        except Exception as error:  # handed to the reader
            await arrived.put((index, error))

    pumps = [asyncio.create_task(pump(index, stream)) for index, stream in enumerate(streams)]
    left = len(streams)
    try:
        while left:
            index, delta = await arrived.get()
            if isinstance(delta, BaseException):
                raise delta
            if delta is None:
                left -= 1
            else:
                yield index, delta
    finally:
        for stream in streams:
            stream.cancel()
        for task in pumps:
            task.cancel()


async def chat_chunks(
    service: Service, body: ChatBody, asking: PreparedRequest, streams: Sequence[Stream]
) -> AsyncIterator[str]:
    """The data of the events of a streamed chat."""
    first = head("chat.completion.chunk", asking, body.model)
    written = json.dumps(first)[:-1]  # once, not for every token

    def chunk(index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Any = None, **more: Any) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return f"{written}, {json.dumps({'choices': [choice], **more})[1:]}"

    spents: dict[int, Spent] = {}
    blank = dict.fromkeys(range(len(streams)), True)  # blanks before the first word are not sent
    for index in range(len(streams)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, delta in merged(streams, asking):
        text = delta.text.lstrip() if blank[index] else delta.text
        blank[index] = blank[index] and not text
        if text or (body.logprobs and delta.tokens):
            logprobs = heard.chat_logprobs(service, delta.tokens) if body.logprobs else None
            yield chunk(index, {"content": text}, logprobs=logprobs)
        if delta.calls:
            yield chunk(index, {"tool_calls": [call_json(call, at) for at, call in enumerate(delta.calls)]})
        if delta.done is not None:
            spents[index] = delta.done.spent
            reason = "tool_calls" if delta.calls else "length" if delta.done.reason == "length" else "stop"
            last = len(spents) == len(streams)
            yield chunk(index, {}, reason, **({"timings": heard.timings(delta.done.spent)} if last else {}))
    if body.stream_options is not None and body.stream_options.include_usage:
        yield json.dumps(first | {"choices": [], "usage": heard.usage([spents[i] for i in sorted(spents)], body.n)})
    yield "[DONE]"


def ask_completion(service: Service, body: CompletionBody) -> list[PreparedRequest]:
    """A request per prompt."""
    prompts = body.prompt if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int) else [body.prompt]
    found = []
    for prompt in prompts:
        tokens = service.encode(prompt) if isinstance(prompt, str) else checked(service, prompt)
        found.append(
            prepare(
                service,
                body.model,
                body.precise(),
                tokens,
                body.sampling(service.grammars.vocabulary),
                most=body.max_tokens,
                stop=body.stops(),
                logprobs=body.logprobs,
                echo=body.echo,
                form=body.response_format,
            )
        )
    return found


def checked(service: Service, tokens: Sequence[int], where: str = "prompt") -> tuple[int, ...]:
    """Token ids that exist."""
    vocabulary = service.grammars.vocabulary
    wrong = next((token for token in tokens if token >= vocabulary), None)
    if wrong is not None:
        raise ValueError(f"{where} holds token {wrong}: token ids go up to {vocabulary - 1}")
    return tuple(tokens)


async def completion(
    service: Service, body: CompletionBody, askings: Sequence[PreparedRequest], streams: Sequence[Stream]
) -> dict[str, Any]:
    """The response of completions that are not streamed."""
    found = await asyncio.gather(*(heard.whole(stream, None) for stream in streams))
    choices = []
    for index, one in enumerate(found):
        prompt = askings[index // body.n].request.tokens
        text = (service.tokenizer.decode(prompt, skip_special_tokens=True) if body.echo else "") + one.text
        logprobs = None if body.logprobs is None else old_logprobs(service, prompt if body.echo else (), one)
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": one.reason}
        choices.append(choice | own_precision(askings, index // body.n))
    spents = [one.done.spent for one in found]
    more = {"choices": choices, "usage": heard.usage(spents, body.n), "timings": heard.timings(spents[0])}
    return head("text_completion", askings[0], body.model) | more


def own_precision(askings: Sequence[PreparedRequest], number: int) -> dict[str, Any]:
    """What an answer was read at, where several prompts may have got several widths."""
    return {"precision": askings[number].read_as.to_json()} if len(askings) > 1 else {}


def old_logprobs(service: Service, prompt: Sequence[int], one: FinishedAnswer) -> dict[str, Any]:
    """Log-probabilities as completions report them: parallel lists, the first token of an echoed prompt without one."""
    tokens: list[Chosen | None] = [None, *one.echoed] if prompt else []
    tokens += one.tokens
    texts = [token_at(service, chosen, prompt) for chosen in tokens]
    offsets = [0]
    for text in texts[:-1]:
        offsets.append(offsets[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [None if chosen is None else max(chosen.logprob, -9999.0) for chosen in tokens],
        "top_logprobs": [
            None if chosen is None else {service.token_text(t): max(p, -9999.0) for t, p in chosen.top}
            for chosen in tokens
        ],
        "text_offset": offsets[: len(texts)],
    }


def token_at(service: Service, chosen: Chosen | None, prompt: Sequence[int]) -> str:
    """The text of a token; None stands for the first of the prompt."""
    return service.token_text(prompt[0] if chosen is None else chosen.token)


async def completion_chunks(
    service: Service, body: CompletionBody, askings: Sequence[PreparedRequest], streams: Sequence[Stream]
) -> AsyncIterator[str]:
    """The data of the events of streamed completions."""
    first = head("text_completion", askings[0], body.model)
    spents: dict[int, Spent] = {}
    async for index, delta in merged(streams, askings[0]):
        reason = None if delta.done is None else "length" if delta.done.reason == "length" else "stop"
        logprobs = None
        if body.logprobs is not None and delta.tokens:
            logprobs = old_logprobs(service, (), FinishedAnswer(delta.text, list(delta.tokens), delta.done))  # type: ignore[arg-type]
        choice = {"index": index, "text": delta.text, "logprobs": logprobs, "finish_reason": reason}
        choice |= own_precision(askings, index // body.n)
        if delta.done is not None:
            spents[index] = delta.done.spent
            choice["timings"] = heard.timings(delta.done.spent)
        if delta.text or reason or logprobs:
            yield json.dumps(first | {"choices": [choice]})
    if body.stream_options is not None and body.stream_options.include_usage:
        yield json.dumps(first | {"choices": [], "usage": heard.usage([spents[i] for i in sorted(spents)], body.n)})
    yield "[DONE]"
