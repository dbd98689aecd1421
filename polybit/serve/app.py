"""The HTTP server: routes, keys, limits, errors in OpenAI's and Anthropic's words; nothing is ignored silently."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from sse_starlette import EventSourceResponse
from sse_starlette.sse import AppStatus
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from polybit import __version__
from polybit.core.runtime import PolybitError
from polybit.serve import anthropic_api, openai_api, responses_api
from polybit.serve.engine import Busy, Closing
from polybit.serve.fields import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from polybit.serve.heard import AnswerFailed, AnswerRefused
from polybit.serve.metrics import ServerMetrics
from polybit.serve.refusal import refusal
from polybit.serve.service import Service, Stream, UnknownModel

OPEN_PATHS = ("/health", "/", "/v1/health")  # without a key
PING_SECONDS = 15
RETRY_SECONDS = 1
OWNER = "polybit"
GONE = 499  # the client closed the connection; nobody reads it, the metrics count it
REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "a field is wrong, unknown or not supported; the message names it"},
    401: {"description": "the API key is missing or wrong"},
    404: {"description": "there is no such model"},
    413: {"description": "the body is too long"},
    429: {"description": "too many requests are waiting; Retry-After says when to come again"},
    503: {"description": "the model is loading, the server is stopping, or this answer failed"},
}


@dataclass
class ServerState:
    """What all routes share. service: None while the model loads; failed: why it never will."""

    keys: tuple[str, ...] = ()
    most_bytes: int = 8 << 20
    service: Service | None = None
    failed: str | None = None
    closing: bool = False
    metrics: ServerMetrics = field(default_factory=ServerMetrics)

    def ready(self) -> Service:
        """The service, or the error that says that it is not there yet."""
        if self.failed is not None:
            raise HTTPException(503, f"the model could not be loaded: {self.failed}")
        if self.closing:
            raise Closing("the server is shutting down: ask again later")
        if self.service is None:
            raise HTTPException(503, "the model is loading: ask again in a moment")
        return self.service


class Guard:
    """Before any route: bodies that are too long and requests without a key are turned away, all are counted."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, size, status = scope["path"], 0, 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.state.most_bytes:
                raise HTTPException(413, f"the body is longer than {self.state.most_bytes} bytes: send less")
            return message

        known = path if path in ROUTES else "other"
        try:
            refusal = self.refusal(scope)
            if refusal is not None:
                await refusal(scope, receive, counted)
            else:
                await self.app(scope, limited, counted)
        finally:
            self.state.metrics.requests.labels(known, str(status)).inc()

    def refusal(self, scope: Scope) -> Response | None:
        """What turns a request away before its body is read."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.state.most_bytes:
            return error_response(
                413, f"the body has {length} bytes: send at most {self.state.most_bytes}", scope["path"]
            )
        if not self.state.keys or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")  # the scheme's case does not matter
        given = token if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        allowed = [hmac.compare_digest(given.encode("latin-1"), key.encode()) for key in self.state.keys]
        if any(allowed):
            return None
        return error_response(401, "the API key is missing or wrong: send Authorization: Bearer KEY", scope["path"])


def error_response(
    status: int,
    message: str,
    path: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error in the words of the API that was asked."""
    message, param = writable(message), None if param is None else writable(param)
    kinds = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "api_error")
    headers = {"Retry-After": str(RETRY_SECONDS), **(headers or {})} if status in (429, 503) else headers
    if path.startswith("/v1/messages"):
        kind = "overloaded_error" if status == 503 else kind
        return JSONResponse({"type": "error", "error": {"type": kind, "message": message}}, status, headers)
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers)


def writable(text: str) -> str:
    """A text that may quote what a client sent, short enough and without halves of characters."""
    return text[:2000].encode("utf-8", "backslashreplace").decode("utf-8")


def add_errors(app: FastAPI) -> None:
    """Every failure is an error in JSON with a sentence; none is a traceback."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        place, message = refusal(error.errors())
        return error_response(400, message, request.url.path, param=place or None)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, str(error.detail), request.url.path, headers=error.headers)

    def said(status: int, code: str | None = None) -> Callable[[Request, Exception], Any]:
        async def handler(request: Request, error: Exception) -> Response:
            return error_response(status, str(error), request.url.path, code=code)

        return handler

    app.exception_handler(UnknownModel)(said(404, "model_not_found"))
    app.exception_handler(Busy)(said(429))
    app.exception_handler(Closing)(said(503))
    app.exception_handler(AnswerFailed)(said(503))
    app.exception_handler(PolybitError)(said(400))
    app.exception_handler(ValueError)(said(400))
    app.exception_handler(RecursionError)(said(400))
    app.exception_handler(MemoryError)(said(503))

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> Response:
        return error_response(500, f"the server failed with {type(error).__name__}: this is a bug", request.url.path)


def make_app(state: ServerState, *, origins: tuple[str, ...] = (), root: str = "") -> FastAPI:
    """The application; `state.service` may come later."""
    AppStatus.disable_automatic_graceful_drain()  # it would cut streams off at a signal; the server drains them itself
    app = FastAPI(
        title="polybit", version=__version__, root_path=root, docs_url=None, redoc_url=None, responses=REFUSALS
    )
    add_errors(app)
    add_models(app, state)
    add_answers(app, state)
    for route in [each for each in app.routes if isinstance(each, APIRoute) and each.methods == {"GET"}]:
        app.head(route.path, include_in_schema=False)(route.endpoint)  # as load balancers ask
    app.add_middleware(Guard, state=state)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])
    return app


def add_models(app: FastAPI, state: ServerState) -> None:
    """What is not an answer: health, names, tokens, metrics, the page."""

    @app.get("/health")
    @app.get("/v1/health")
    async def health() -> Response:
        if state.service is None or state.closing:
            what = "error" if state.failed else "closing" if state.closing else "loading model"
            return JSONResponse({"status": what, "message": state.failed}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        service = state.ready()
        rows = [
            {"id": name, "object": "model", "created": service.created, "owned_by": OWNER, "meta": dict(service.notes)}
            for name in service.names()
        ]
        return {"object": "list", "data": rows}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service = state.ready()
        if name not in service.names():
            raise UnknownModel(f"there is no model {name!r:.120} here: GET /v1/models lists all")
        return {"id": name, "object": "model", "created": service.created, "owned_by": OWNER}

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        service = state.ready()
        tokens = list(await run_in_threadpool(service.encode, body.content, special=body.add_special))
        if not body.with_pieces:
            return {"tokens": tokens}
        return {"tokens": [{"id": token, "piece": service.token_text(token)} for token in tokens]}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, str]:
        service = state.ready()
        tokens = list(openai_api.checked(service, body.tokens, "tokens"))
        return {"content": await run_in_threadpool(service.tokenizer.decode, tokens)}

    @app.get("/metrics")
    async def metrics() -> Response:
        if state.service is not None:
            engine = state.service.engine
            state.metrics.running.set(len(engine.running))
            state.metrics.waiting.set(len(engine.waiting))
            state.metrics.steps.set(engine.steps)
            state.metrics.rows.set(engine.rows)
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return (files("polybit.serve") / "page.html").read_text(encoding="utf-8")


def add_answers(app: FastAPI, state: ServerState) -> None:
    """What is an answer: chats and completions in three APIs."""

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatBody) -> Any:
        service = state.ready()
        asking = await run_in_threadpool(openai_api.ask_chat, service, body)
        streams = service.all_streams([asking], body.n)
        if not body.stream:
            return await unless_gone(request, openai_api.chat(service, body, asking, streams), streams)
        return Events(plain(openai_api.chat_chunks(service, body, asking, streams)), streams)

    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionBody) -> Any:
        service = state.ready()
        askings = await run_in_threadpool(openai_api.ask_completion, service, body)
        streams = service.all_streams(askings, body.n)
        if not body.stream:
            return await unless_gone(request, openai_api.completion(service, body, askings, streams), streams)
        return Events(plain(openai_api.completion_chunks(service, body, askings, streams)), streams)

    @app.post("/v1/responses")
    async def respond(request: Request, body: responses_api.ResponsesBody) -> Any:
        service = state.ready()
        asking = await run_in_threadpool(responses_api.ask_responses, service, body)
        [stream] = service.all_streams([asking])
        if not body.stream:
            return await unless_gone(request, responses_api.response(body, asking, stream), [stream])
        return Events(responses_api.response_events(body, asking, stream), [stream])

    @app.post("/v1/messages")
    async def message(request: Request, body: anthropic_api.MessagesBody) -> Any:
        service = state.ready()
        asking = await run_in_threadpool(anthropic_api.ask_messages, service, body)
        [stream] = service.all_streams([asking])
        if not body.stream:
            return await unless_gone(request, anthropic_api.message(body, asking, stream), [stream])
        return Events(anthropic_api.message_events(body, asking, stream), [stream])

    @app.post("/v1/messages/count_tokens")
    async def count(body: anthropic_api.CountBody) -> dict[str, int]:
        return await run_in_threadpool(anthropic_api.count_tokens, state.ready(), body)


ROUTES = (
    "/health",
    "/v1/health",
    "/v1/models",
    "/tokenize",
    "/detokenize",
    "/metrics",
    "/",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
)


async def plain(data: AsyncIterator[str]) -> AsyncIterator[tuple[str | None, str]]:
    """Events without a name, as OpenAI's streams have them."""
    async for one in data:
        yield None, one


class Events(EventSourceResponse):
    """A stream of server-sent events; whatever ends it, even before it began, its answers end with it."""

    def __init__(self, pairs: AsyncIterator[tuple[str | None, str]], streams: Sequence[Stream]) -> None:
        self.streams = streams
        super().__init__(written(pairs), ping=PING_SECONDS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for stream in self.streams:
                stream.cancel()


async def written(pairs: AsyncIterator[tuple[str | None, str]]) -> AsyncIterator[bytes]:
    """Events as bytes (data is JSON, which has no line ends); an answer that fails ends with an event that says so."""
    try:
        async for name, data in pairs:
            yield event_bytes(name, data)
    except PolybitError as error:
        kind = "invalid_request_error" if isinstance(error, AnswerRefused) else "api_error"
        said = {"type": "error", "error": {"type": kind, "message": str(error)}}
        yield event_bytes("error", json.dumps(said))


def event_bytes(name: str | None, data: str) -> bytes:
    """One server-sent event."""
    return (f"data: {data}\r\n\r\n" if name is None else f"event: {name}\r\ndata: {data}\r\n\r\n").encode()


async def unless_gone(request: Request, answer: Coroutine[Any, Any, Any], streams: Sequence[Stream]) -> Any:
    """An answer that is not streamed; given up when the client goes away, so that its place is free."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(left())
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return answering.result()
        raise HTTPException(GONE, "the client closed the connection")
    finally:
        answering.cancel()
        leaving.cancel()
        for stream in streams:
            stream.cancel()
