"""The process: listens at once, loads the model beside it, drains on SIGTERM."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable

import uvicorn

from polybit.core.runtime import PolybitError
from polybit.serve.app import ServerState, make_app
from polybit.serve.service import Service


class Server(uvicorn.Server):
    """uvicorn's server that stops taking requests first, and gives running answers time to finish."""

    def __init__(self, config: uvicorn.Config, state: ServerState, drain: float) -> None:
        super().__init__(config)
        self.state, self.drain = state, drain

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then close connections."""
        self.state.closing = True
        service = self.state.service
        if service is not None:
            await asyncio.to_thread(service.engine.close, self.drain)
            await asyncio.sleep(0.1)  # the last events are on their way to their readers
            service.templates.close()
        await super().shutdown(sockets)


def run(
    load: Callable[[], Service],
    *,
    host: str,
    port: int,
    keys: tuple[str, ...] = (),
    origins: tuple[str, ...] = (),
    most_bytes: int = 8 << 20,
    drain: float = 30.0,
    told: Callable[[str], None] = print,
) -> None:
    """Serve until a signal comes. load: makes the service, called in a thread while /health says 503."""
    state = ServerState(keys=keys, most_bytes=most_bytes)
    app = make_app(state, origins=origins)
    listening = open_socket(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"

    def begin() -> None:
        try:
            service = load()
        except Exception as error:
            state.failed = str(error) or type(error).__name__  # raised below, once the server has stopped
            server.should_exit = True
            return
        service.note, service.first_seconds = state.metrics.note, state.metrics.first.observe
        state.service = service
        told(f"{service.name} at {address}, precisions {', '.join(service.precisions)} and auto")

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_keep_alive=30, timeout_graceful_shutdown=5, lifespan="off"
    )
    server = Server(config, state, drain)
    told(f"listening at {address}, loading the model")
    threading.Thread(target=begin, name="polybit-loading", daemon=True).start()
    server.run(sockets=[listening])
    if state.failed is not None:
        raise PolybitError(f"the model could not be loaded: {state.failed}")


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket, or the sentence that says why not."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # named, not 0: asyncio sends small pieces at once (TCP_NODELAY) only where it sees that this is TCP
    opened = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((host, port))
    except (OSError, OverflowError) as error:
        opened.close()
        raise PolybitError(f"--host {host} --port {port} cannot be listened on ({error}): choose another") from None
    opened.listen(1024)
    return opened
