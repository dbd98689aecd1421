"""Three APIs as their official clients speak them, names and precisions, keys, limits; nothing is ignored silently."""

import dataclasses
import json
import socket
import sys

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from polybit.cli import main
from polybit.commands.serve import unread
from polybit.nn.switch import at
from polybit.options.serve import ServeOptions
from polybit.serve import anthropic_api
from polybit.serve.app import ServerState
from polybit.serve.policy import AutoPolicy
from polybit.serve.server import open_socket
from polybit.serve.tools import call_schema
from tests.serve.conftest import WIDTHS, idle, make_service, serving

anthropic = pytest.importorskip("anthropic")
openai = pytest.importorskip("openai")

CHAT = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look_up", "description": "Looks up.", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def claude(address):
    return anthropic.Anthropic(base_url=address, api_key="none", max_retries=0, timeout=30)


def chat(client, **more):
    given = {"model": "tinychat", "messages": CHAT, "temperature": 0, "max_tokens": 12, **more}
    return client.chat.completions.create(**given)


# OpenAI's chat ---------------------------------------------------------------------------------------------------


def test_a_chat(client):
    found = chat(client)
    assert found.object == "chat.completion" and found.model == "tinychat" and found.id.startswith("chatcmpl-")
    [choice] = found.choices
    assert choice.message.role == "assistant" and choice.message.content and choice.finish_reason in ("stop", "length")
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.usage.completion_tokens <= 12
    assert found.precision == {"width": "w8", "chosen_by": "default"}
    assert found.timings["predicted_n"] == found.usage.completion_tokens


def test_a_streamed_chat_says_the_same(client):
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).strip()
        == whole.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens and chunks[-1].choices == []
    assert any(getattr(c, "timings", None) for c in chunks) and len({c.id for c in chunks}) == 1


def test_the_stream_ends_with_done(web):
    with web.stream(
        "POST", "/v1/chat/completions", json={"model": "tinychat", "messages": CHAT, "max_tokens": 3, "stream": True}
    ) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)


@pytest.mark.parametrize("stream", [False, True])
def test_several_answers_each_with_a_seed_of_its_own(client, stream):
    def texts():
        found = chat(client, n=3, seed=5, temperature=1.5, stream=stream)
        if not stream:
            return [choice.message.content for choice in found.choices]
        said = ["", "", ""]
        for chunk in found:
            for choice in chunk.choices:
                said[choice.index] += choice.delta.content or ""
        return [text.strip() for text in said]

    first = texts()
    assert first == texts() and len(set(first)) > 1
    assert first[1] == chat(client, seed=6, temperature=1.5).choices[0].message.content


def test_stop_texts(client):
    text = chat(client).choices[0].message.content
    mark = text[4:7]
    found = chat(client, stop=["never said", mark]).choices[0]
    assert found.message.content == text[: text.index(mark)].strip() and found.finish_reason == "stop"
    assert chat(client, stop=mark).choices[0].message.content == found.message.content


def test_logprobs(client):
    found = chat(client, logprobs=True, top_logprobs=3, max_tokens=4).choices[0]
    tokens = found.logprobs.content
    assert len(tokens) <= 4 and all(len(token.top_logprobs) == 3 for token in tokens)
    assert all(token.logprob == pytest.approx(token.top_logprobs[0].logprob) for token in tokens)
    assert "".join(token.token for token in tokens).strip().startswith(found.message.content)
    streamed = [
        token
        for chunk in chat(client, logprobs=True, top_logprobs=3, max_tokens=4, stream=True)
        for token in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else ())
    ]
    assert [t.token for t in streamed] == [t.token for t in tokens]
    assert chat(client).choices[0].logprobs is None


def test_logit_bias_penalties_and_cuts(client, web):
    first = chat(client, logprobs=True, max_tokens=1).choices[0].logprobs.content[0].token
    [token] = web.post("/tokenize", json={"content": first}).json()["tokens"]
    banned = chat(client, logit_bias={str(token): -100}, logprobs=True, max_tokens=1).choices[0]
    assert banned.logprobs.content[0].token != first
    forced = chat(client, logit_bias={str(token): 100}, max_tokens=3, temperature=1).choices[0].message.content
    assert forced == (first * 3).strip()
    repeated = chat(client, max_tokens=30, extra_body={"repetition_penalty": 5.0}).choices[0].message.content
    assert repeated != chat(client, max_tokens=30).choices[0].message.content
    for cut in ({"top_k": 1}, {"min_p": 1.0}):
        assert (
            chat(client, temperature=2, extra_body=cut).choices[0].message.content
            == chat(client).choices[0].message.content
        )
    for cut in ({"top_p": 0}, {"top_p": 1e-300}):
        assert chat(client, temperature=2, **cut).choices[0].message.content == chat(client).choices[0].message.content
    assert chat(client, temperature=5e-324).choices[0].message.content == chat(client).choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_keeps_to_its_schema(client, stream):
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}
    found = chat(client, response_format=form, max_tokens=60, n=2, temperature=1.5, seed=1, stream=stream)
    if stream:
        said = ["", ""]
        for chunk in found:
            for choice in chunk.choices:
                said[choice.index] += choice.delta.content or ""
    else:
        said = [choice.message.content for choice in found.choices]
        assert all(choice.finish_reason == "stop" for choice in found.choices)
    for text in said:
        value = json.loads(text)
        assert value["city"] in ("Paris", "Rome") and isinstance(value["big"], bool) and len(value) == 2


def test_any_object(client):
    found = chat(client, response_format={"type": "json_object"}, max_tokens=40).choices[0]
    assert found.message.content.startswith("{")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_be_made(client, choice, stream):
    found = chat(client, tools=[TOOL], tool_choice=choice, max_tokens=80, stream=stream)
    if stream:
        chunks = list(found)
        calls = [call for c in chunks for call in (c.choices[0].delta.tool_calls or ())]
        reason = chunks[-1].choices[0].finish_reason
        assert not "".join(c.choices[0].delta.content or "" for c in chunks)
    else:
        calls, reason = found.choices[0].message.tool_calls, found.choices[0].finish_reason
        assert found.choices[0].message.content is None
    assert reason == "tool_calls" and len(calls) == 1 and calls[0].function.name == "look_up"
    assert json.loads(calls[0].function.arguments)["city"] in ("Paris", "Rome")


def test_tools_that_may_be_called(client):
    told = chat(client, tools=[TOOL], tool_choice="auto")
    assert told.choices[0].message.content and told.choices[0].message.tool_calls is None
    assert told.usage.prompt_tokens > chat(client).usage.prompt_tokens  # the functions are told
    assert chat(client, tools=[TOOL], tool_choice="none").usage.prompt_tokens == chat(client).usage.prompt_tokens
    call = {"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": '{"city": "Paris"}'}}
    turns = [
        *CHAT,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "2 million"},
    ]
    assert chat(client, messages=turns, tools=[TOOL]).choices[0].message.content is not None


def test_a_strict_call_keeps_to_its_schema(client, service, web):
    strict = {"type": "function", "function": TOOL["function"] | {"strict": True}}
    assert chat(client, tools=[strict]).choices[0].message.content  # it need not be made
    first = web.post("/tokenize", json={"content": "<tool_call>"}).json()["tokens"]
    grammar = service.grammars.calls_within(("<tool_call>", "</tool_call>"), call_schema([strict["function"]]), "tools")
    encode = service.tokenizer.encode

    def allowed(text):
        matcher = grammar.copy().matcher
        return all(matcher.try_consume_tokens([token]) for token in encode(text, add_special_tokens=False))

    assert first and allowed("Some text < and <b> more.")
    for made in (
        '{"name": "look_up", "arguments": {"city": "Paris", "big": true}}',
        '{"name":"look_up","arguments":{"city":"Rome","big":false}}',
    ):
        assert allowed(f"Well: <tool_call>{made}</tool_call> done") and allowed(f"<tool_call>\n{made}\n</tool_call>")
        assert not allowed(f"<tool_call>{made.replace('look_up', 'other')}") and not allowed(
            f"<tool_call>{made[:-3]}</tool_call>"
        )


# completions -----------------------------------------------------------------------------------------------------


def test_completions(client):
    given = {
        "model": "tinychat",
        "prompt": ["The capital of France is", "Two and two make"],
        "temperature": 0,
        "max_tokens": 6,
    }
    found = client.completions.create(**given, n=2)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.choices[0].text == found.choices[1].text != found.choices[2].text
    assert found.usage.completion_tokens <= 24 and found.usage.prompt_tokens > 8
    streamed = {0: "", 1: ""}
    for chunk in client.completions.create(**given, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert [streamed[0], streamed[1]] == [found.choices[0].text, found.choices[2].text]


def test_an_echoed_prompt_has_log_probabilities(client, web):
    prompt = "The capital of France is"
    found = client.completions.create(
        model="tinychat", prompt=prompt, temperature=0, max_tokens=1, echo=True, logprobs=2
    )
    [choice] = found.choices
    assert choice.text.startswith(prompt) and choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
    assert len(choice.logprobs.tokens) == len(choice.logprobs.top_logprobs) == found.usage.total_tokens
    tokens = web.post("/tokenize", json={"content": prompt, "add_special": True}).json()["tokens"]
    only = client.completions.create(model="tinychat", prompt=tokens, max_tokens=0, echo=True, logprobs=0)
    assert only.choices[0].text == prompt
    assert only.choices[0].logprobs.token_logprobs == choice.logprobs.token_logprobs[: len(tokens)]


# responses -------------------------------------------------------------------------------------------------------


def respond(client, **more):
    given = {"model": "tinychat", "input": "What is the capital of France?", "temperature": 0, "max_output_tokens": 12}
    return client.responses.create(**{**given, **more})


def test_responses(client):
    found = respond(client, instructions="Be brief.")
    assert found.output_text and found.status in ("completed", "incomplete") and found.precision["width"] == "w8"
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    events = list(respond(client, instructions="Be brief.", stream=True))
    assert events[0].type == "response.created" and events[-1].type == f"response.{found.status}"
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta").strip() == found.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    again = [
        *({"role": "user", "content": "Hello"},),
        found.output[0].model_dump(exclude_none=True),
        {"role": "user", "content": "And?"},
    ]
    assert respond(client, input=again).output_text


def test_responses_with_form_and_tools(client):
    form = {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA}}
    assert json.loads(respond(client, text=form, max_output_tokens=60).output_text)["city"] in ("Paris", "Rome")
    tool = {"type": "function", "name": "look_up", "parameters": SCHEMA, "strict": True}
    for choice in ("required", {"type": "function", "name": "look_up"}):
        found = respond(client, tools=[tool], tool_choice=choice, max_output_tokens=80)
        [call] = found.output
        assert call.type == "function_call" and json.loads(call.arguments)["city"] in ("Paris", "Rome")
        events = list(respond(client, tools=[tool], tool_choice=choice, max_output_tokens=80, stream=True))
        assert [e.arguments for e in events if e.type == "response.function_call_arguments.done"] == [call.arguments]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "2 million"}
    turns = [{"role": "user", "content": "Hello"}, call.model_dump(exclude_none=True), result]
    assert respond(client, input=turns).output_text is not None


# Anthropic's messages --------------------------------------------------------------------------------------------


def test_messages(claude):
    given = {"model": "tinychat", "max_tokens": 12, "messages": CHAT, "extra_body": {"temperature": 0}}
    given["system"] = "Be brief."
    found = claude.messages.create(**given)
    assert found.role == "assistant" and found.content[0].text and found.stop_reason in ("end_turn", "max_tokens")
    with claude.messages.stream(**given) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert text.strip() == found.content[0].text and last.stop_reason == found.stop_reason
    assert last.usage.output_tokens == found.usage.output_tokens > 0
    mark = found.content[0].text[4:7]
    cut = claude.messages.create(**given, stop_sequences=[mark])
    assert cut.stop_reason == "stop_sequence" and cut.stop_sequence == mark
    counted = claude.messages.count_tokens(model="tinychat", messages=CHAT, system="Be brief.")
    used = found.usage
    assert counted.input_tokens == used.input_tokens + used.cache_read_input_tokens


def test_messages_with_tools(claude):
    tool = {"name": "look_up", "description": "Looks up.", "input_schema": SCHEMA}
    given = {"model": "tinychat", "max_tokens": 80, "messages": CHAT, "tools": [tool]}
    for choice in ({"type": "any"}, {"type": "tool", "name": "look_up"}):
        found = claude.messages.create(**given, tool_choice=choice)
        [call] = found.content
        assert found.stop_reason == "tool_use" and call.name == "look_up" and call.input["city"] in ("Paris", "Rome")
        with claude.messages.stream(**given, tool_choice=choice) as stream:
            last = stream.get_final_message()
        assert last.stop_reason == "tool_use" and [b.type for b in last.content] == ["tool_use"]
        assert last.content[-1].input["city"] in ("Paris", "Rome")
    turns = [
        *CHAT,
        {"role": "assistant", "content": [{"type": "tool_use", "id": call.id, "name": call.name, "input": call.input}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "2 million"}]},
    ]
    found = claude.messages.create(**{**given, "messages": turns, "max_tokens": 5})
    assert found.content[0].type == "text"
    with pytest.raises(anthropic.BadRequestError, match="tool_choice"):
        claude.messages.create(**given, tool_choice={"type": "tool", "name": "other"})


# names, precisions, keys -----------------------------------------------------------------------------------------


def test_models(client, web):
    names = [model.id for model in client.models.list()]
    assert names == ["tinychat", *(f"tinychat@{width}" for width in (*WIDTHS, "auto"))]
    assert client.models.retrieve("tinychat@w4").id == "tinychat@w4"
    notes = web.get("/v1/models").json()["data"][0]["meta"]
    assert notes["bytes_per_token"]["w2"] < notes["bytes_per_token"]["w4"] < notes["bytes_per_token"]["w8"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("tinychat@w5")


@pytest.mark.parametrize("width", WIDTHS)
def test_a_width_by_name_or_by_field(client, width):
    named = chat(client, model=f"tinychat@{width}", logprobs=True)
    asked = chat(client, logprobs=True, extra_body={"precision": width})
    told = chat(client, logprobs=True, extra_body={"precision": {"width": width}})
    assert named.precision == asked.precision == told.precision == {"width": width, "chosen_by": "request"}
    lists = [[t.logprob for t in one.choices[0].logprobs.content] for one in (named, asked, told)]
    assert lists[0] == lists[1] == lists[2]


def test_auto_drafts_gates_and_prefill(client):
    found = chat(client, model="tinychat@auto")
    assert found.precision["width"] in WIDTHS and found.precision["chosen_by"] in ("default", "load")
    wide = chat(client, model="tinychat@w8", max_tokens=20)
    drafted = chat(client, max_tokens=20, extra_body={"precision": {"draft": "w4", "drafts": 3}})
    assert drafted.choices[0].message.content == wide.choices[0].message.content
    assert drafted.timings["draft_n"] >= drafted.timings["draft_n_accepted"] and drafted.precision["draft"] == "w4"
    gated = chat(client, extra_body={"precision": {"width": "w2", "gate": "w8", "margin": 100.0}})
    assert gated.timings["gated_n"] == gated.usage.completion_tokens
    mixed = chat(client, extra_body={"precision": {"width": "w2", "prefill": "w8"}})
    assert mixed.precision == {"width": "w2", "prefill": "w8", "chosen_by": "request"}


@pytest.mark.parametrize("model", ["gpt-4", "tinychat@", "other@w4", "../../etc/passwd", "tinychat@w4@w4"])
def test_names_nobody_answers_to(client, model):
    with pytest.raises((openai.NotFoundError, openai.BadRequestError)) as caught:
        chat(client, model=model)
    assert caught.value.body["message"]


def test_precisions_that_are_not_served(client):
    for more in (
        {"model": "tinychat@w7"},
        {"extra_body": {"precision": "w16"}},
        {"extra_body": {"precision": {"draft": "w9"}}},
    ):
        with pytest.raises(openai.BadRequestError, match="not served"):
            chat(client, **more)
    with pytest.raises(openai.BadRequestError, match="give one of them"):
        chat(client, model="tinychat@w4", extra_body={"precision": "w8"})


REFUSED = {
    "/v1/chat/completions": (
        "audio",
        "modalities",
        "reasoning_effort",
        "functions",
        "prediction",
        "service_tier",
        "made_up",
    ),
    "/v1/completions": ("best_of", "suffix", "made_up"),
    "/v1/responses": (
        "previous_response_id",
        "background",
        "include",
        "truncation",
        "reasoning",
        "conversation",
        "made_up",
    ),
    "/v1/messages": ("thinking", "container", "mcp_servers", "service_tier", "made_up"),
    "/v1/messages/count_tokens": ("thinking", "made_up"),
    "/tokenize": ("made_up",),
    "/detokenize": ("made_up",),
}
BODIES = {
    "/v1/chat/completions": {"model": "tinychat", "messages": CHAT},
    "/v1/completions": {"model": "tinychat", "prompt": "a"},
    "/v1/responses": {"model": "tinychat", "input": "a"},
    "/v1/messages": {"model": "tinychat", "messages": CHAT, "max_tokens": 1},
    "/v1/messages/count_tokens": {"model": "tinychat", "messages": CHAT},
    "/tokenize": {"content": "a"},
    "/detokenize": {"tokens": [1]},
}


@pytest.mark.parametrize("path", REFUSED)
def test_what_is_not_honoured_is_refused_by_name(web, path):
    for name in REFUSED[path]:
        reply = web.post(path, json=BODIES[path] | {name: "x"})
        error = reply.json()["error"]
        assert reply.status_code == 400 and name in error["message"], (name, reply.text)
        assert error["type"] == "invalid_request_error" and error.get("param", name) == name
    assert (
        web.post(path, json=BODIES[path] | ({"max_tokens": 1} if "max_tokens" in BODIES[path] else {})).status_code
        == 200
    )


PATHS = {"responses": "/v1/responses", "messages": "/v1/messages", "count": "/v1/messages/count_tokens"}
USELESS = [  # each field is known, and nothing would use it
    ("/v1/chat/completions", {"precision": {"width": "w4", "margin": 1.0}}, "margin needs gate"),
    ("/v1/completions", {"precision": {"width": "w4", "drafts": 5}}, "drafts needs draft or lookup"),
    ("/v1/chat/completions", {"tool_choice": "required"}, "tool_choice needs tools"),
    (PATHS["responses"], {"tool_choice": "required"}, "tool_choice needs tools"),
    (PATHS["responses"], {"tool_choice": {"type": "function", "name": "f"}, "tools": []}, "tool_choice needs tools"),
    (PATHS["messages"], {"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
    (PATHS["count"], {"tool_choice": {"type": "tool", "name": "f"}}, "tool_choice needs tools"),
]


@pytest.mark.parametrize(("path", "fields", "said"), USELESS)
def test_what_nothing_would_use_is_refused_too(web, path, fields, said):
    reply = web.post(path, json=BODIES[path] | fields)
    assert reply.status_code == 400 and said in reply.json()["error"]["message"], reply.text


PICTURE = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]
CACHED = [{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}]
NAMED = [  # fields that may be several things: the sentence names what is wrong in the one that was meant
    ("/v1/chat/completions", {"precision": {"wdth": "w4"}}, "precision.wdth", "not supported"),
    ("/v1/chat/completions", {"precision": 5}, "precision", "a valid string or Input should be a valid dictionary"),
    ("/v1/chat/completions", {"messages": PICTURE}, "messages.0.content.1.type", "should be 'text'"),
    ("/v1/chat/completions", {"stop": ["a"] * 17}, "stop", "at most 16"),
    ("/v1/chat/completions", {"Made-Up": 1}, "Made-Up", "not supported"),
    ("/v1/completions", {"prompt": [[1], [-1]]}, "prompt.1.0", "greater than or equal to 0"),
    (PATHS["responses"], {"input": [{"type": "reasoning"}]}, "input.0.type", "'function_call_output'"),
    (PATHS["messages"], {"messages": CACHED}, "messages.0.content.0.cache_control", "not supported"),
    (
        PATHS["messages"],
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "messages.0.content.0",
        "'image'",
    ),
]


@pytest.mark.parametrize(("path", "fields", "place", "said"), NAMED)
def test_a_refusal_names_what_was_meant(web, path, fields, place, said):
    reply = web.post(path, json=BODIES[path] | fields)
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["message"].startswith(place) and said in error["message"], reply.text
    assert error.get("param", place) == place


def test_tokens_are_counted_for_a_model_that_is_here(web):
    for model, status in (("tinychat@w4", 200), ("tinychat@auto", 200), ("gpt-4", 404), ("tinychat@w9", 400)):
        assert web.post(PATHS["count"], json=BODIES[PATHS["count"]] | {"model": model}).status_code == status, model


def test_a_failed_call_is_told_as_one(service):
    block = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "no such city"}]}
    for failed, told in ((True, "Error: no such city"), (False, "no such city")):
        turns = [{"role": "user", "content": [block | {"is_error": failed}]}]
        body = anthropic_api.CountBody.model_validate({"model": "tinychat", "messages": turns})
        assert [turn["content"] for turn in body.turns()] == [told]


@pytest.mark.parametrize("stream", [False, True])
def test_every_prompt_says_its_own_width(web, service, monkeypatch, stream):
    monkeypatch.setattr(service, "policy", AutoPolicy(("w4", "w2"), needs=lambda tokens: ("w2", "w4")[len(tokens) > 3]))
    ask = {"model": "tinychat@auto", "prompt": [[9, 9], [9] * 5], "max_tokens": 3, "n": 2, "stream": stream}
    text = web.post("/v1/completions", json=ask).text
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: {")] if stream else [text]
    found = {c["index"]: c["precision"] for line in lines for c in json.loads(line)["choices"]}
    assert [found[i]["width"] for i in range(4)] == ["w2", "w2", "w4", "w4"]


def test_tokens(web):
    found = web.post("/tokenize", json={"content": "Paris is big", "with_pieces": True}).json()["tokens"]
    assert "".join(token["piece"] for token in found).strip() == "Paris is big"
    back = web.post("/detokenize", json={"tokens": [token["id"] for token in found]}).json()["content"]
    assert back.strip() == "Paris is big"
    assert web.post("/detokenize", json={"tokens": [10**6]}).status_code == 400


def test_metrics(web, client):
    chat(client, model="tinychat@w3")
    text = web.get("/metrics").text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    answers = [sample.labels for sample in samples if sample.name == "polybit_answers_total"]
    assert {"chosen_by": "request", "width": "w3"} in answers
    assert "polybit_time_to_first_token_seconds_count" in text and "polybit_requests_processing" in text
    requests = [sample.labels for sample in samples if sample.name == "polybit_requests_total"]
    assert {"path": "/v1/chat/completions", "status": "200"} in requests


def test_loading_and_failing():
    state = ServerState()
    with serving(state) as base, httpx.Client(base_url=base) as web:
        assert web.get("/health").status_code == 503 and web.get("/health").json()["status"] == "loading model"
        reply = web.post("/v1/chat/completions", json=BODIES["/v1/chat/completions"])
        assert (
            reply.status_code == 503 and "loading" in reply.json()["error"]["message"] and reply.headers["retry-after"]
        )
        reply = web.post("/v1/messages", json=BODIES["/v1/messages"])
        assert reply.status_code == 503 and reply.json()["error"]["type"] == "overloaded_error"
        assert web.get("/").status_code == web.get("/metrics").status_code == 200
        asked = web.head("/health")  # as load balancers ask
        assert asked.status_code == 503 and asked.content == b""
        state.failed = "no such file"
        assert web.get("/health").json() == {"status": "error", "message": "no such file"}


def test_health(web):
    assert web.get("/health").json() == {"status": "ok"}
    for path in ("/health", "/v1/health", "/", "/v1/models", "/metrics"):
        assert web.head(path).status_code == 200 and web.head(path).content == b""
    wrong = web.put("/v1/chat/completions")
    assert wrong.status_code == 405 and wrong.json()["error"]["message"] and wrong.headers["allow"] == "POST"
    assert web.get("/nothing").status_code == 404 and web.get("/nothing").json()["error"]["type"] == "not_found_error"


def test_keys_and_origins(service):
    state = ServerState(service=service, keys=("first", "second", "schlüssel"))
    with serving(state, shared=True, origins=("https://page.example",)) as base:
        for key in ("first", "second"):
            assert openai.OpenAI(base_url=f"{base}/v1", api_key=key).models.list().data
            assert anthropic.Anthropic(base_url=base, api_key=key).messages.count_tokens(
                model="tinychat", messages=CHAT
            )
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{base}/v1", api_key="third").models.list()
        with pytest.raises(anthropic.AuthenticationError):
            anthropic.Anthropic(base_url=base, api_key="third").messages.count_tokens(model="tinychat", messages=CHAT)
        for method in ("POST", "OPTIONS"):
            asks = {"origin": "https://page.example", "access-control-request-method": "POST"}
            reply = httpx.request(method, f"{base}/v1/chat/completions", headers=asks)
            assert reply.headers["access-control-allow-origin"] == "https://page.example"
        assert httpx.get(f"{base}/health").status_code == httpx.get(f"{base}/").status_code == 200
        assert httpx.get(f"{base}/metrics").status_code == 401
        for said in ("bearer first", "BEARER schlüssel", "Bearer second"):
            sent = {"Authorization": said.encode()}
            assert httpx.get(f"{base}/metrics", headers=sent).status_code == 200, said
        for said in ("first", "Basic first", "Bearer", "Bearer  first"):
            assert httpx.get(f"{base}/metrics", headers={"Authorization": said}).status_code == 401, said


def test_a_full_queue_says_when_to_come_again(rounded):
    service = make_service(rounded, slots=1, queue=1, context=512)
    body = BODIES["/v1/chat/completions"] | {
        "max_tokens": 400,
        "stream": True,
        "logit_bias": {"2": -100, "1": -100, "0": -100},
    }
    with serving(ServerState(service=service)) as base, httpx.Client(base_url=base, timeout=30) as web:
        with (
            web.stream("POST", "/v1/chat/completions", json=body) as one,
            web.stream("POST", "/v1/chat/completions", json=body) as two,
        ):
            assert one.status_code == two.status_code == 200
            busy = web.post("/v1/chat/completions", json=body)
            assert busy.status_code == 429 and int(busy.headers["retry-after"]) >= 1
            assert busy.json()["error"]["type"] == "rate_limit_error"
            busy = web.post("/v1/messages", json=BODIES["/v1/messages"])
            assert busy.status_code == 429 and busy.json()["type"] == "error"
            assert web.get("/health").status_code == 200
            many = web.post("/v1/completions", json={"model": "tinychat", "prompt": "a", "n": 3})
            assert many.status_code == 400 and "at most 2" in many.json()["error"]["message"]
        assert idle(service)
        assert web.post("/v1/messages", json=BODIES["/v1/messages"]).status_code == 200
    service.engine.close(5)


# flags, a file, the environment ----------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """What `polybit serve` would serve with."""
    found = []
    monkeypatch.setattr("polybit.acts.serve.serve", lambda model, options: found.append(options))

    def ask(*flags, config=None, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(f"POLYBIT_SERVE_{name}", value)
        main(["serve", "tinychat", *flags, *(["--config", str(config)] if config else [])])
        return found.pop()

    return ask


VALUES = {
    "host": "0.0.0.0",
    "port": "9001",
    "name": "mine",
    "precision": "w4",
    "auto": "w4,w3",
    "auto_from": "0.5",
    "auto_to": "3.5",
    "slots": "3",
    "context": "64",
    "max_tokens": "77",
    "queue": "5",
    "chunk": "33",
    "threads": "1",
    "api_key": "a,b",
    "api_key_file": "keys.txt",
    "cors": "*",
    "max_body": "4096",
    "drain": "1.5",
    "device": "cpu",
    "trust_remote_code": "true",
}


def test_every_flag_is_an_environment_variable(asked):
    assert set(VALUES) == {field.name for field in dataclasses.fields(ServeOptions)}
    found = asked(**{name.upper(): value for name, value in VALUES.items()})
    for name, value in VALUES.items():
        assert str(getattr(found, name)) in (value, value.title()), name


def test_a_mistyped_variable_is_named(asked, capsys):
    asked(PORT="9001", PROT="9002")
    said = capsys.readouterr().err
    assert "POLYBIT_SERVE_PROT is set, and no flag" in said and "POLYBIT_SERVE_PORT " not in said
    assert not unread([f"POLYBIT_SERVE_{name.upper()}" for name in (*VALUES, "model")] + ["POLYBIT_SERVER", "PATH"])


def test_a_file_is_stronger_than_the_environment_and_a_flag_than_both(asked, tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text("[serve]\nport = 9002\nslots = 4\n")
    found = asked("--slots", "6", config=file, PORT="9001", SLOTS="5", QUEUE="7")
    assert (found.port, found.slots, found.queue) == (9002, 6, 7)
    with pytest.raises(SystemExit):
        asked(PORT="no number")


def test_without_its_libraries_serve_says_what_to_install(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith(("polybit.acts.serve", "polybit.serve.server"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit):
        main(["serve", "tinychat"])
    assert "serve needs uvicorn: pip install 'polybit[serve]'" in capsys.readouterr().err


def test_pieces_are_sent_at_once():
    """asyncio switches Nagle's algorithm off only for sockets that say that they are TCP: without, 40 ms a piece."""
    with open_socket("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        assert listening.proto == socket.IPPROTO_TCP


def test_the_way_lm_eval_reads_log_likelihoods(web, service):
    """lm-eval's local-completions: token ids in, echo, one token too many, the sum over the continuation."""
    context, continuation = "The capital of France is", " Paris and"
    tokens = [service.tokenizer.encode(context)] * 2 + [service.tokenizer.encode(context + continuation)]
    ask = {"model": "tinychat@w8", "prompt": [tokens[2], tokens[2]], "temperature": 0, "max_tokens": 1}
    reply = web.post("/v1/completions", json=ask | {"logprobs": 1, "seed": 1234, "echo": True})
    sums = []
    for choice in sorted(reply.json()["choices"], key=lambda choice: choice["index"]):
        kept = slice(len(tokens[0]), -1)
        logprobs, top = choice["logprobs"]["token_logprobs"][kept], choice["logprobs"]["top_logprobs"][kept]
        assert len(logprobs) == len(tokens[2]) - len(tokens[0]) > 0 and all(value < 0 for value in logprobs)
        greedy = all(value == max(each.values()) for value, each in zip(logprobs, top, strict=True))
        sums.append((sum(logprobs), greedy))
    assert sums[0] == sums[1]
    with torch.inference_mode(), at(service.engine.runner.rows.decoder.model, "w8"):
        logp_TV = service.engine.runner.rows.decoder.model(torch.tensor([tokens[2]])).logits[0].float().log_softmax(-1)
    places = range(len(tokens[0]) - 1, len(tokens[2]) - 1)
    assert sums[0][0] == pytest.approx(sum(float(logp_TV[t, tokens[2][t + 1]]) for t in places), abs=0.05)
