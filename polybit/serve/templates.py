"""Chats to text by the checkpoint's own template, rendered in a process of its own with limits of time and memory."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from polybit.core.runtime import PolybitError

SECONDS = 5.0  # a template may take
START_SECONDS = 30.0  # until the process is there
WORKER = "polybit.serve.template_worker"


class Templates:
    """Renders chats with one template; a template that takes too long is stopped, and the next chat begins anew."""

    def __init__(self, template: str | None, special: Mapping[str, str], *, seconds: float = SECONDS) -> None:
        self.template, self.special, self.seconds = template, dict(special), seconds
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.lines: queue.Queue[str] = queue.Queue()

    @classmethod
    def of(cls, tokenizer: Any) -> Templates:
        """The default template of a tokenizer, with its special tokens by name."""
        template = getattr(tokenizer, "chat_template", None)
        if isinstance(template, Mapping):
            template = template.get("default")
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        return cls(template, special)

    def begin(self) -> None:
        """Start the process now, so that the first chat does not wait for it."""
        if self.template is not None:
            with self.lock:
                self.start()

    def takes(self, word: str) -> bool:
        """Whether the template speaks of a value at all, as of `tools`."""
        return self.template is not None and word in self.template

    def render(self, messages: Sequence[Mapping[str, Any]], **more: Any) -> str:
        """The prompt of a chat, ready for the answer; PolybitError for what the template refuses or cannot do."""
        if self.template is None:
            raise PolybitError("this checkpoint has no chat template: use /v1/completions, which takes plain text")
        values = {**self.special, "messages": list(messages), "add_generation_prompt": True, **more}
        if not self.lock.acquire(timeout=2 * self.seconds):
            raise PolybitError("the chat template of this checkpoint is too slow: other chats wait for it")
        try:
            answer = self.ask({"template": self.template, "values": values})
        finally:
            self.lock.release()
        if "error" in answer:
            raise PolybitError(f"the chat template cannot write this chat: {answer['error']}")
        return str(answer["text"])

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """One question to the process, which is started at the first and killed when it does not answer."""
        process = self.process
        if process is None or process.poll() is not None:
            process = self.start()
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            return json.loads(self.lines.get(timeout=self.seconds))
        except (queue.Empty, OSError, ValueError):
            self.close()
            return {"error": f"it took more than {self.seconds:g} seconds, or too much memory"}

    def start(self) -> subprocess.Popen[str]:
        """A new process, ready."""
        command = [sys.executable, "-m", WORKER]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = process = subprocess.Popen(command, text=True, encoding="utf-8", **pipes)  # type: ignore
        lines: queue.Queue[str] = queue.Queue()
        self.lines = lines

        def listen() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put("")  # no JSON: whoever waits learns that the process is gone

        threading.Thread(target=listen, daemon=True).start()
        if "ready" not in (lines.get(timeout=START_SECONDS) or ""):
            self.close()
            raise PolybitError("the process that renders chat templates does not start: is jinja2 installed?")
        return process

    def close(self) -> None:
        """Stop the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None
