"""What clients, checkpoints and machines do wrong: an error that says so, or nothing; the server answers on."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace

import httpx
import pytest

from polybit.serve.app import ServerState
from polybit.serve.templates import Templates
from tests.serve.conftest import idle, make_service, raw, serving

CHAT, COMPLETE, RESPOND, MESSAGE = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
COUNT = "/v1/messages/count_tokens"
GOOD = {
    CHAT: {"model": "tinychat", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
    COMPLETE: {"model": "tinychat", "prompt": "Hi", "max_tokens": 3},
    RESPOND: {"model": "tinychat", "input": "Hi", "max_output_tokens": 3},
    MESSAGE: {"model": "tinychat", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
    COUNT: {"model": "tinychat", "messages": [{"role": "user", "content": "Hi"}]},
    "/tokenize": {"content": "Hi"},
    "/detokenize": {"tokens": [3]},
}
JSON = {"content-type": "application/json"}


@pytest.fixture(autouse=True)
def lives(web, service):
    """After every fault the same server answers, and nobody holds a place."""
    yield
    reply = web.post(CHAT, json=GOOD[CHAT])
    assert reply.status_code == 200, reply.text
    assert idle(service)


def refused(reply, *statuses):
    """An error of the client, said as one, quickly."""
    assert reply.status_code in (statuses or (400,)), (reply.status_code, reply.text[:300])
    message = reply.json()["error"]["message"]
    assert 0 < len(message) < 3000
    return message


# bodies ----------------------------------------------------------------------------------------------------------

BROKEN = [b"", b"{", b"null", b"[]", b'"text"', b"3", b"NaN", b"\xff\xfe{}", b"{}", b'{"model": 3}', b"[" * 100_000]
BROKEN += [b'{"model": "tinychat"}', b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b'{"\\ud800": 1}', b"1" * 100_000]


@pytest.mark.parametrize("path", GOOD)
def test_bodies_that_are_none(web, path):
    for body in BROKEN:
        refused(web.post(path, content=body, headers=JSON))
    refused(web.post(path, data={"model": "tinychat"}))
    refused(web.post(path, content=b"x" * (9 << 20), headers=JSON), 413)

    def chunks():
        for _ in range(90):
            yield b" " * (100 << 10)

    with suppress(httpx.HTTPError):  # the server may close before it has heard all
        refused(web.post(path, content=chunks(), headers=JSON), 413)


WRONG = {
    CHAT: [
        {"messages": value}
        for value in (None, [], {}, "Hi", 3, [3], [None], ["Hi"], [{}], [{"role": "user"}], [{"content": "Hi"}])
    ]
    + [
        {"messages": [{"role": "user", "content": value}]}
        for value in (None, 3, {}, [3], [{}], [{"type": "image_url", "image_url": {"url": "http://x"}}])
    ]
    + [
        {"messages": [{"role": "emperor", "content": "Hi"}]},
        {"messages": [{"role": "user", "content": "Hi", "tool_calls": []} | {"tool_calls": [{"id": "1"}]}]},
        {"messages": GOOD[CHAT]["messages"] * 5000},
        *({"max_tokens": value} for value in (-5, 0, 1e9, 10**9, 10**40, "x", None is None, [], 2.5)),
        *({"max_completion_tokens": value} for value in (-5, 0, 10**9, "x")),
        *({"temperature": value} for value in (float("nan"), float("inf"), -1, 3, "hot", True, [])),
        *({"top_p": value} for value in (float("nan"), -0.1, 1.1, "x")),
        *({"n": value} for value in (10**6, 0, -1, 1.5, "2", 17)),
        *({"stop": value} for value in (["x"] * 10_000, "", [""], 3, [None], "x" * 100_000)),
        *(
            {"logit_bias": value}
            for value in ({"x": 1}, {"-1": 1}, {"1000000": 1}, {"1": 1e9}, {"1": "x"}, [], {"²": 1})
        ),
        {"logit_bias": {str(i): 1 for i in range(100_000)}},
        *({"seed": value} for value in ("x", 1.5, 10**30)),
        *({"top_logprobs": value} for value in (3, -1, "x")),
        {"logprobs": True, "top_logprobs": 10**6},
        *({"repetition_penalty": value} for value in (0, -1, 1e-320, float("nan"))),
        *({"top_k": value} for value in (-1, 10**12, "x")),
        *({"stream": value} for value in ("yes", 1, "true")),
        {"stream_options": {"include_usage": True}},
        *({"tools": value} for value in ([], {}, "x", [{"type": "function"}], [{"type": "web_search"}])),
        {"tools": [{"type": "function", "function": {"name": "a b"}}]},
        {"tools": [{"type": "function", "function": {"name": "a"}}] * 2},
        {
            "tools": [{"type": "function", "function": {"name": "a"}}],
            "tool_choice": {"type": "function", "function": {"name": "b"}},
        },
        {"tool_choice": "required"},
        *(
            {"precision": value}
            for value in ("w1", "", "w4a8", "../w4", 4, [], {"width": "w4", "drafts": 0}, {"draft": "w44"})
        ),
        {"precision": {"gate": "w4", "margin": float("nan")}},
        {"max_tokens": 1, "max_completion_tokens": 1},
    ],
    COMPLETE: [
        {"prompt": value}
        for value in (None, 3, {}, [], [[]], [None], ["a", 3], [-1], [10**6], [[10**12]], [1.5], "", [""] * 300)
    ]
    + [{"prompt": ["a"] * 256}, {"max_tokens": 0}, {"logprobs": 21}, {"echo": True, "stream": True}],
    RESPOND: [{"input": value} for value in (None, 3, {}, [], [3], [{}], [{"role": "tool", "content": "x"}])]
    + [
        {"input": [{"type": "reasoning"}]},
        {"text": {"format": {"type": "json_schema"}}},
        {"tool_choice": {"type": "function", "name": "b"}},
    ],
    MESSAGE: [{"messages": value} for value in (None, [], {}, "Hi", [3], [{}], [{"role": "system", "content": "x"}])]
    + [{"max_tokens": value} for value in (0, -5, 10**9, "x", 1e9)]
    + [{"temperature": float("nan")}, {"temperature": 1.5}, {"stop_sequences": ["x"] * 10_000}, {"stop_sequences": 3}]
    + [
        {"tool_choice": {"type": "tool"}},
        {"tools": [{"name": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
    ],
    COUNT: [{"messages": value} for value in (None, [], "Hi")] + [{"max_tokens": 3}],
    "/tokenize": [{"content": value} for value in (None, 3, ["a"])],
    "/detokenize": [{"tokens": value} for value in (None, "a", [-1], [1.5], [10**9], [10**30])],
}


@pytest.mark.parametrize("path", WRONG)
def test_values_that_are_none(web, path):
    for wrong in WRONG[path]:
        started = time.monotonic()
        body = json.dumps(GOOD[path] | wrong)
        message = refused(web.post(path, content=body, headers=JSON), 400)
        assert time.monotonic() - started < 10, f"slow: {body:.100}"
        assert any(name in message for name in (*names_in(wrong), "token", "prompt")), (wrong, message)


def names_in(value):
    """All names of fields in a body."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield from (name.removeprefix("max_"), *names_in(inner))


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "http://169.254.169.254/",
        "x" * 10_000,
        "\0",
        "tinychat@" + "w" * 200,
        "",
        "😀",
        "@",
        "tinychat@auto@auto",
    ],
)
def test_names_of_models(web, name):
    for path in (CHAT, COMPLETE, RESPOND, MESSAGE):
        refused(web.post(path, json=GOOD[path] | {"model": name}), 400, 404)
    refused(web.get("/v1/models/" + name.replace("\0", "%00") if name else "/v1/models/x"), 404)


# texts -----------------------------------------------------------------------------------------------------------


def test_prompts_that_are_too_long(web, service):
    room = service.room
    for count, status in ((room - 1, 200), (room, 400), (room + 1, 400), (50 * room, 400)):
        reply = web.post(COMPLETE, json=GOOD[COMPLETE] | {"prompt": [5] * count})
        assert reply.status_code == status, (count, reply.text[:200])
        if status == 400:
            assert str(room - 1) in refused(reply)
        else:
            assert reply.json()["usage"]["completion_tokens"] == 1
    long = "word " * 210_000  # 1 MB
    turn = [{"role": "user", "content": long}]
    for path, wrong in (
        (CHAT, {"messages": turn}),
        (COMPLETE, {"prompt": long}),
        (RESPOND, {"input": long}),
        (MESSAGE, {"messages": turn}),
    ):
        started = time.monotonic()
        refused(web.post(path, json=GOOD[path] | wrong))
        assert time.monotonic() - started < 10
    just = "a b " * 9000  # short enough to be cut into tokens, too many of them
    refused(web.post(CHAT, json=GOOD[CHAT] | {"messages": [{"role": "user", "content": just}]}))


ODD = [
    "\0",
    "a\0b",
    "שלום عليكم \u202e abc",
    "👩‍👩‍👧‍👦🏴‍☠️",
    "\u0301" * 50,
    "\ufffe\uffff",
    "<|im_start|>system",
    "{{ 7*7 }}",
    "\r\n\t\v",
    " " * 300,
    "𝕳𝖎",
]


@pytest.mark.parametrize("text", ODD)
def test_odd_texts(web, text):
    turn = [{"role": "user", "content": text}]
    for path, odd in (
        (CHAT, {"messages": turn}),
        (COMPLETE, {"prompt": text}),
        (RESPOND, {"input": text}),
        (MESSAGE, {"messages": turn}),
    ):
        reply = web.post(path, json=GOOD[path] | odd)
        assert reply.status_code == 200, reply.text
    reply = web.post(CHAT, json=GOOD[CHAT] | {"stop": [text[:200]], "user": text})
    assert reply.status_code == 200, reply.text


def test_halves_of_characters(web):
    half = '"\\ud800"'
    for path in (CHAT, COMPLETE, RESPOND, MESSAGE, "/tokenize"):
        body = json.dumps(GOOD[path]).replace('"Hi"', half)
        refused(web.post(path, content=body, headers=JSON))
        refused(web.post(path, content=json.dumps(GOOD[path])[:-1] + f", {half}: 1}}", headers=JSON))
        refused(web.post(path, content=json.dumps(GOOD[path])[:-1] + f', "stop": {half}}}', headers=JSON))
        refused(
            web.post(path, content=json.dumps(GOOD[path] | {"model": "HALF"}).replace('"HALF"', half), headers=JSON),
            400,
            404,
        )


# forms -----------------------------------------------------------------------------------------------------------

RECURSIVE = {
    "$ref": "#/$defs/node",
    "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}},
}
DEEP: dict = {"type": "string"}
for _ in range(200):
    DEEP = {"type": "array", "items": DEEP}
SCHEMAS = [
    (RECURSIVE, (200,)),
    ({"$ref": "#"}, (200, 400)),
    ({"$ref": "http://169.254.169.254/schema.json"}, (400,)),
    ({"$ref": "file:///etc/passwd"}, (400,)),
    (DEEP, (400,)),
    ({"enum": ["x" * 1000 + str(i) for i in range(1000)]}, (400,)),
    ({"enum": [f"word {i}" for i in range(2000)]}, (200, 400)),
    ({"allOf": [{"type": "string"}, {"type": "integer"}]}, (400,)),
    ({"enum": []}, (400,)),
    (False, (400,)),
    ({"type": "string", "minLength": 5, "maxLength": 3}, (400,)),
    ({"type": "integer", "minimum": 5, "maximum": 3}, (400,)),
    ({"type": "string", "pattern": "(a+)+$"}, (200, 400)),
    ({"type": "string", "pattern": "(?=x)((((a{1,1000}){1,1000}){1,1000}){1,1000})"}, (400,)),
    ({"type": "string", "pattern": "["}, (400,)),
    ({"type": "string", "minLength": 10**9}, (200, 400)),
    ({"type": "array", "minItems": 10**9}, (200, 400)),
    ({"type": "made up"}, (400,)),
    ({"type": 3}, (400,)),
    ({"properties": []}, (200, 400)),
    ([], (400,)),
    ("x", (400,)),
    (None, (400,)),
    ({"not": {}}, (400,)),
]


@pytest.mark.parametrize("schema, statuses", SCHEMAS)
def test_schemas(web, schema, statuses):
    started = time.monotonic()
    forms = {CHAT: {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}}
    forms[RESPOND] = {"text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}}
    for path, form in forms.items():
        reply = web.post(path, json=GOOD[path] | form)
        assert reply.status_code in statuses, (path, reply.status_code, reply.text[:300])
    if isinstance(schema, dict):
        tool = {"type": "function", "function": {"name": "a", "parameters": schema}}
        reply = web.post(CHAT, json=GOOD[CHAT] | {"tools": [tool], "tool_choice": "required"})
        assert reply.status_code in (*statuses, 400), reply.text[:300]
    assert time.monotonic() - started < 20


# checkpoints -----------------------------------------------------------------------------------------------------

HOSTILE = {
    "endless": "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}",
    "a loop over itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "gigabytes": "{{ 'a' * 10**10 }}",
    "gigabytes of text": "{% for i in range(90000) %}{{ 'a' * 10**5 }}{% endfor %}",
    "a file": "{% include '/etc/passwd' %}",
    "powers": "{{ 9 ** (9 ** 9) }}",
    "no template": "{% for %}",
    "refusal": "{{ raise_exception('no') }}",
}


@pytest.fixture(scope="module")
def hostile(service):
    state = ServerState(service=service)
    with serving(state, shared=True) as base:
        yield state, base


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_templates(service, hostile, kind):
    state, base = hostile
    templates = Templates(HOSTILE[kind], {}, seconds=0.5)
    state.service = replace(service, templates=templates)
    templates.start()
    started = time.monotonic()
    for path in (CHAT, COUNT):
        message = refused(httpx.post(base + path, json=GOOD[path], timeout=20))
        assert "template" in message and "root:" not in message
    assert httpx.post(base + COMPLETE, json=GOOD[COMPLETE], timeout=20).status_code == 200
    assert time.monotonic() - started < 15
    templates.close()


def test_while_a_template_hangs_others_are_answered(service, hostile):
    state, base = hostile
    templates = Templates(HOSTILE["endless"], {}, seconds=2)
    state.service = replace(service, templates=templates)
    templates.start()
    waiting = [threading.Thread(target=lambda: httpx.post(base + CHAT, json=GOOD[CHAT], timeout=60)) for _ in range(4)]
    for thread in waiting:
        thread.start()
    time.sleep(0.2)
    started = time.monotonic()
    assert httpx.get(base + "/health").status_code == 200
    assert httpx.post(base + COMPLETE, json=GOOD[COMPLETE], timeout=20).status_code == 200
    assert time.monotonic() - started < 1.5
    for thread in waiting:
        thread.join()
    templates.close()


# readers ---------------------------------------------------------------------------------------------------------


def endless(path, stream):
    """A request whose answer takes all the room there is."""
    more = {"max_output_tokens" if path == RESPOND else "max_tokens": 480, "stream": stream}
    if path in (CHAT, COMPLETE):
        more["logit_bias"] = {str(token): -100 for token in range(4)}
    return GOOD[path] | more


def send(address, path, body):
    """A request on a bare connection, which is left open."""
    connection = raw(address)
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    connection.sendall(head.encode() + text)
    return connection


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", [CHAT, COMPLETE])
def test_a_client_that_goes_away_frees_its_place(address, service, web, path, stream):
    def counts():
        lines = web.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("polybit_tokens_predicted_total"))

    before = counts()
    connections = [send(address, path, endless(path, stream)) for _ in range(4)]
    if stream:
        assert b"200" in connections[0].recv(4096)
    deadline = time.monotonic() + 10
    while len(service.engine.running) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    for connection in connections:
        connection.close()
    assert idle(service)
    assert counts() - before < 4 * 400  # they were not written to their end


def test_a_slow_reader_holds_nobody_up(address, service, web):
    connection = send(address, CHAT, endless(CHAT, True))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    for _ in range(3):
        assert connection.recv(1)
        started = time.monotonic()
        assert web.post(CHAT, json=GOOD[CHAT]).status_code == 200
        assert time.monotonic() - started < 5
        time.sleep(0.3)
    assert idle(service), "its answer waits for its reader, not its place"
    connection.close()


def test_five_hundred_idle_connections(address, web):
    idlers = [raw(address) for _ in range(500)]
    for connection in idlers[::2]:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Le")
    started = time.monotonic()
    for _ in range(3):
        assert web.post(CHAT, json=GOOD[CHAT]).status_code == 200
    assert time.monotonic() - started < 5
    for connection in idlers:
        connection.close()


def test_no_http(address):
    for text in (
        b"\0" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"hello\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    ):
        with raw(address) as connection:
            connection.sendall(text)
            assert b" 500 " not in connection.recv(4096)


# the machine -----------------------------------------------------------------------------------------------------


def test_one_request_out_of_memory(rounded):
    service = make_service(rounded, slots=4, context=128)
    poison, read = 77, service.engine.runner.read

    def failing(parts, keep):
        if any(poison in part.tokens for part in parts):
            raise MemoryError("no memory is left")
        return read(parts, keep)

    with serving(ServerState(service=service)) as base, httpx.Client(base_url=base, timeout=30) as web:

        def ask(prompt, stream=False):
            body = {"model": "tinychat", "prompt": prompt, "max_tokens": 30, "temperature": 0, "stream": stream}
            return web.post(COMPLETE, json=body | {"logit_bias": {str(poison): -100}})

        alone = [ask([9, 8, seed]).json()["choices"][0]["text"] for seed in range(10, 14)]
        service.engine.runner.read = failing
        found = {}
        threads = [
            threading.Thread(target=lambda p=p: found.update({p[-1]: ask(p)}))
            for p in ([9, 8, 10], [9, 8, 11], [5, poison], [9, 8, 12], [9, 8, 13])
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert "no memory is left" in refused(found[poison], 503)
        assert [found[seed].json()["choices"][0]["text"] for seed in range(10, 14)] == alone
        streamed = ask([5, poison], stream=True)
        assert streamed.status_code == 200 and "event: error" in streamed.text and "no memory" in streamed.text
    service.engine.close(5)


def test_a_stopping_server_lets_answers_finish(rounded):
    service = make_service(rounded, slots=2, context=256)
    body = GOOD[CHAT] | {"max_tokens": 150, "stream": True, "logit_bias": {str(token): -100 for token in range(4)}}
    with serving(ServerState(service=service)) as base:
        connections = [send(base, CHAT, body) for _ in range(3)]  # two running, one waiting
        assert b"200" in connections[0].recv(4096)
        while len(service.engine.running) + len(service.engine.waiting) < 3:
            time.sleep(0.005)
    for connection in connections:
        text = b""
        while part := connection.recv(65536):
            text += part
        assert b"[DONE]" in text and b'"finish_reason": "length"' in text


def start(port, *flags):
    """`polybit serve` in a process of its own, ready."""
    command = [sys.executable, "-m", "polybit", "serve", "tinychat", "--port", str(port), "--device", "cpu", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=os.environ | {"POLYBIT_SERVE_SLOTS": "2"})
    for _ in range(600):
        assert process.poll() is None, process.stderr.read().decode()
        try:
            if httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return process
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise AssertionError("it does not become ready")


@pytest.mark.slow
def test_sigterm_drains_and_kill_leaves_nothing_behind():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    body = GOOD[CHAT] | {"max_tokens": 200, "stream": True, "logit_bias": {str(token): -100 for token in range(4)}}
    process = start(port)
    streams = [send(base, CHAT, body) for _ in range(4)]
    assert b"200" in streams[0].recv(4096)
    process.send_signal(signal.SIGTERM)
    for connection in streams[:2]:
        connection.settimeout(60)
        text = b""
        while part := connection.recv(65536):
            text += part
        assert b"[DONE]" in text
    assert process.wait(60) in (0, -signal.SIGTERM)
    process = start(port)
    stream = send(base, CHAT, body)
    assert b"200" in stream.recv(4096)
    process.kill()
    process.wait()
    process = start(port)  # the same port, at once
    assert httpx.post(base + CHAT, json=GOOD[CHAT], timeout=60).status_code == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(60) is not None
