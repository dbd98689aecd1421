"""What `serve` can be told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from polybit.core.runtime import PolybitError
from polybit.options.checks import Device, at_least, names_of


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where a model is served, to whom, and within which limits. Every flag can also be set as POLYBIT_SERVE_FLAG."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 = every one, which asks for --api-key."""
    port: int = 8080
    """Port; 0 = a free one."""
    name: str | None = None
    """What clients call the model (default: the name of its directory)."""
    precision: str | None = None
    """Width of a request that names none (default: the widest stored)."""
    auto: str | None = None
    """Widths a request for NAME@auto may get, with commas (default: all that are stored)."""
    auto_from: float = 0.75
    """Requests per place above which auto requests get fewer bits."""
    auto_to: float = 2.0
    """Requests per place at which they get the fewest."""
    slots: int = 8
    """Answers that are written at the same time."""
    context: int | None = None
    """Tokens of prompt and answer together (default: what the model reads, at most 8192)."""
    max_tokens: int = 4096
    """Longest answer."""
    queue: int = 64
    """Requests that may wait; more are told to come again (429)."""
    chunk: int = 256
    """Tokens of prompts read between two tokens of the running answers."""
    threads: int | None = None
    """Threads that compute (default: what OMP_NUM_THREADS says, else every core; one for a small model)."""
    api_key: str | None = None
    """Keys that are accepted, with commas (default: none is asked for)."""
    api_key_file: Path | None = None
    """File with a key per line, instead of or beside --api-key."""
    cors: str | None = None
    """Origins whose pages may ask, with commas, * = all (default: none but the server's own page)."""
    max_body: int = 8 << 20
    """Longest body of a request, in bytes."""
    drain: float = 30.0
    """Seconds that running answers have to finish when the server is stopped."""
    device: Device = "cpu"
    """Where the model runs; the compiled decoder of many rows is a CPU's."""
    trust_remote_code: bool = False
    """Allow code that the model's repository brings."""

    def __post_init__(self) -> None:
        at_least(self, slots=1, context=2, max_tokens=1, queue=0, chunk=1, max_body=1024, threads=1)
        if not 0 <= self.port <= 65535:
            raise PolybitError(f"--port {self.port} is not possible: give 0 to 65535")
        if not 0 <= self.auto_from < self.auto_to:
            raise PolybitError(f"--auto-from {self.auto_from} must be 0 or more and below --auto-to {self.auto_to}")
        if self.name is not None and ("@" in self.name or not self.name):
            raise PolybitError(f"--name {self.name!r} is not possible: @ stands before the width, as in NAME@w4")
        if self.host not in ("127.0.0.1", "localhost", "::1") and not (self.api_key or self.api_key_file):
            raise PolybitError(
                f"--host {self.host} can be reached from other machines: give --api-key or --api-key-file"
            )

    def keys(self) -> tuple[str, ...]:
        """All keys that are accepted."""
        found = names_of(self.api_key)
        if self.api_key_file is not None:
            try:
                lines = self.api_key_file.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise PolybitError(f"--api-key-file {self.api_key_file} cannot be read: {error}") from None
            found += [line.strip() for line in lines if line.strip()]
            if not found:
                raise PolybitError(f"--api-key-file {self.api_key_file} holds no key: write one per line")
        return tuple(found)
