"""A judge for tests: a local OpenAI-compatible endpoint that answers by a rule, and can be slow, down, rude or mad."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Rule = Callable[..., str | tuple[int, object] | dict]


class FakeJudge:
    """`rule(messages)`, or rule(token ids) of a prompt to be gone on with, gives the reply's text, (status, body) for
    an error, or a whole completion as a dict."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.asked, self.busy, self.most_busy = rule, [], 0, 0
        self.lock = threading.Lock()
        self.url = ""
        self.seconds = 0.0

    def answer(self, messages: list) -> tuple[int, bytes]:
        with self.lock:
            self.asked.append(messages)
            self.busy += 1
            self.most_busy = max(self.most_busy, self.busy)
        try:
            time.sleep(self.seconds)
            found = self.rule(messages)
        finally:
            with self.lock:
                self.busy -= 1
        if isinstance(found, tuple):
            return found[0], json.dumps(found[1]).encode() if not isinstance(found[1], bytes) else found[1]
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": found}}
        if isinstance(messages[0], int):
            choice = {"index": 0, "finish_reason": "stop", "text": found}
        body = found if isinstance(found, dict) else {"id": "1", "object": "chat.completion", "choices": [choice]}
        return 200, json.dumps(body).encode()


@contextmanager
def serve(rule: Rule) -> Iterator[FakeJudge]:
    """Run the judge on a free port of this machine."""
    judge = FakeJudge(rule)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, data = judge.answer(body.get("messages") or body["prompt"])
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.send_header("retry-after-ms", "10")
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client lost its patience, as some tests want it to

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
