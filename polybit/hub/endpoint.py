"""Ask a model behind an OpenAI-compatible endpoint: retried, a few at a time, every reply kept on disk at once.

A reply is filed under a digest of everything that decides it (model, messages, sampling), so a run that was killed asks
only for what is missing, and two runs that ask the same share the answer. The network enters by this file only.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from polybit.core.runtime import PolybitError, track

Messages = Sequence[Mapping[str, str]]
PATIENCE = 5  # requests in a row that may fail after all retries before the endpoint counts as down


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a model is and how it is asked.

    url: base address, as in https://api.openai.com/v1 or http://localhost:8000/v1 · model: its name there ·
    timeout: seconds for one reply · retries: further attempts after a timeout, a refused connection, 429 or a server
    error, with growing pauses and the server's Retry-After · concurrency: requests at a time.
    """

    url: str
    model: str
    key: str = "none"
    temperature: float = 0.0
    max_tokens: int = 2048
    timeout: float = 120.0
    retries: int = 4
    concurrency: int = 4


@dataclass(frozen=True, slots=True)
class Continue:
    """A prompt as token ids, to be gone on with; other requests are the messages of a chat."""

    ids: tuple[int, ...]


Request = Messages | Continue


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back: `text` and why it ended; `refused` when the model declined to answer."""

    text: str
    finish: str
    refused: bool = False


def request_key(endpoint: Endpoint, request: Request) -> str:
    """sha256 of all that decides a reply; where the model runs and how patient we are do not."""
    asked = list(request.ids) if isinstance(request, Continue) else [dict(message) for message in request]
    decides = [endpoint.model, endpoint.temperature, endpoint.max_tokens, asked]
    return hashlib.sha256(json.dumps(decides, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


class ReplyCache:
    """Replies in one SQLite file; each is on disk before the next is taken, and several processes may share it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        try:
            with closing(self._open()) as db, db:
                db.execute(
                    "CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, text TEXT, finish TEXT, refused INT)"
                )
        except sqlite3.DatabaseError as error:
            raise PolybitError(
                f"The replies in {path} cannot be read ({error}); move the file away to ask again."
            ) from error

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=30)

    def read(self, keys: Sequence[str]) -> dict[str, Reply]:
        """The replies that are there."""
        with closing(self._open()) as db:
            rows = (
                db.execute("SELECT text, finish, refused FROM replies WHERE key = ?", (k,)).fetchone() for k in keys
            )
            return {k: Reply(r[0], r[1], bool(r[2])) for k, r in zip(keys, rows, strict=True) if r is not None}

    def write(self, key: str, reply: Reply) -> None:
        """Keep one reply; the first of two equal requests stays."""
        with closing(self._open()) as db, db:
            db.execute(
                "INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?)", (key, reply.text, reply.finish, reply.refused)
            )


def ask(
    endpoint: Endpoint, requests: Sequence[Request], cache: ReplyCache, *, label: str = "judge"
) -> list[Reply | None]:
    """Replies in the order of the requests, None where the endpoint gave none after all retries.

    What fails is not cached, so the next run asks for it again. Raises PolybitError, which says how many replies are
    kept, when the endpoint cannot be used at all: wrong key, unknown model, or PATIENCE failures in a row.
    """
    keys = [request_key(endpoint, request) for request in requests]
    found: dict[str, Reply | None] = dict(cache.read(keys))
    missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in found}
    if missing:
        send = open_client(endpoint)
        failures = 0
        finished = _in_parallel(send, missing, endpoint.concurrency)
        for key, outcome in track(finished, label, total=len(set(keys)), done=len(found)):
            if isinstance(outcome, Reply):
                cache.write(key, outcome)
                found[key], failures = outcome, 0
                continue
            found[key] = None
            failures += 1
            if outcome.fatal or failures >= min(PATIENCE, len(missing)):
                kept = sum(reply is not None for reply in found.values())
                raise PolybitError(f"{outcome} ({kept} of {len(set(keys))} replies are kept: run again to go on)")
    return [found[key] for key in keys]


class Failure(Exception):
    """Why one request got no reply; `fatal` when every other would fare alike."""

    def __init__(self, sentence: str, *, fatal: bool) -> None:
        super().__init__(sentence)
        self.fatal = fatal


def _in_parallel(
    send: Callable[[Request], Reply], requests: Mapping[str, Request], concurrency: int
) -> Iterator[tuple[str, Reply | Failure]]:
    """Each request's outcome as it arrives; when the consumer stops, nothing further is sent.

    The threads are daemons: Ctrl-C ends the program at once and does not wait for a model that is thinking.
    """
    waiting: SimpleQueue[tuple[str, Request]] = SimpleQueue()
    outcomes: SimpleQueue[tuple[str, Reply | Failure | BaseException]] = SimpleQueue()
    stop = threading.Event()
    for item in requests.items():
        waiting.put(item)

    def work() -> None:
        while not stop.is_set():
            try:
                key, request = waiting.get_nowait()
            except Empty:
                return
            try:
                outcomes.put((key, send(request)))
            except BaseException as error:
                if not isinstance(error, Failure) or error.fatal:
                    stop.set()  # before anybody can send the next one
                # handed over: what the endpoint did as an outcome, what we did to the caller
                outcomes.put((key, error))

    for _ in range(min(concurrency, len(requests))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in requests:
            key, outcome = outcomes.get()
            if not isinstance(outcome, (Reply, Failure)):
                raise outcome
            yield key, outcome
    finally:
        stop.set()


def open_client(endpoint: Endpoint) -> Callable[[Request], Reply]:
    """A function that sends one request through the `openai` library, which retries; failures become Failure."""
    try:
        import openai
    except ImportError as error:
        raise PolybitError(
            "An endpoint is asked through the library openai: run pip install 'polybit[judge]'."
        ) from error
    try:
        client = openai.OpenAI(
            base_url=endpoint.url, api_key=endpoint.key, timeout=endpoint.timeout, max_retries=endpoint.retries
        )
    except Exception as error:  # the library's own complaint about an address that is none
        raise PolybitError(
            f"The address {endpoint.url!r} cannot be used ({error}); give one as in http://localhost:8000/v1."
        ) from error

    def send(request: Request) -> Reply:
        how: Any = {
            "model": endpoint.model,
            "temperature": endpoint.temperature,
            "max_tokens": endpoint.max_tokens,
        }
        try:
            if isinstance(request, Continue):
                answer: Any = client.completions.create(prompt=list(request.ids), **how)
            else:
                messages: Any = [dict(message) for message in request]
                answer = client.chat.completions.create(messages=messages, **how)
        except openai.OpenAIError as error:
            if refusal := _refusal(error):
                return refusal
            raise explain(error, endpoint) from error
        except ValueError:  # a reply that calls itself JSON and is none
            raise no_endpoint(endpoint) from None
        return read_answer(answer, endpoint)

    return send


def no_endpoint(endpoint: Endpoint) -> Failure:
    """What answers there is something else."""
    return Failure(
        f"The endpoint at {endpoint.url} answers, but not with a completion; give the address of an "
        "OpenAI-compatible endpoint, usually one that ends in /v1.",
        fatal=True,
    )


def read_answer(answer: Any, endpoint: Endpoint) -> Reply:
    """The text of a completion; something that is none is a Failure."""
    try:
        choice = answer.choices[0]
        message = getattr(choice, "message", None)
        text = choice.text if message is None else message.content
        refusal = getattr(message, "refusal", None)
    except (AttributeError, IndexError, TypeError):
        raise no_endpoint(endpoint) from None
    finish = str(choice.finish_reason or "")
    refused = bool(refusal) or finish == "content_filter"
    return Reply(str(text or refusal or ""), finish, refused)


def _refusal(error: Exception) -> Reply | None:
    """A content filter that answers with status 400 is a refusal, not a fault of ours."""
    code = str(getattr(error, "code", "") or "")
    return Reply(str(error)[:300], code, True) if code == "content_filter" else None


def explain(error: Any, endpoint: Endpoint) -> Failure:
    """The sentence for one exception of the library."""
    import openai

    where, status = f"The endpoint at {endpoint.url}", getattr(error, "status_code", None)
    said = " ".join(str(getattr(error, "message", "") or error).split())[:160]
    attempts = f"after {endpoint.retries + 1} attempts" if endpoint.retries else "at the first attempt"
    if isinstance(error, openai.APITimeoutError):
        return Failure(
            f"{where} gave no reply within {endpoint.timeout:g} s {attempts}; raise --timeout or lower --concurrency.",
            fatal=False,
        )
    if isinstance(error, openai.APIConnectionError):
        return Failure(f"{where} cannot be reached {attempts}; start it or mend --endpoint.", fatal=False)
    if status in (401, 403):
        return Failure(
            f"{where} refuses the key (status {status}); put a valid one into the variable --key-from names.",
            fatal=True,
        )
    if status == 404:
        return Failure(f"{where} does not know {endpoint.model!r} or the address ({said}); mend either.", fatal=True)
    if status == 429:
        return Failure(
            f"{where} limits our rate or quota {attempts} ({said}); lower --concurrency or wait.", fatal=False
        )
    if status is not None and status < 500:
        return Failure(f"{where} rejects a request with status {status} ({said}).", fatal=False)
    return Failure(f"{where} fails {attempts} with status {status} ({said}); look at its own log.", fatal=False)
