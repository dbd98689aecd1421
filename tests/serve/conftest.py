"""A server on a free port: the embedded model rounded to 8 nested bits in memory, at widths 8, 4, 3 and 2."""

import socket
import threading
import time
from contextlib import contextmanager

import pytest

from polybit.core.affine import Grid
from polybit.core.planes import pack
from polybit.hub.models import open_model
from polybit.nn.convert import convert, targets
from polybit.quant.rtn import rtn
from polybit.serve.loading import service_of

for library in ("fastapi", "uvicorn", "sse_starlette", "prometheus_client", "llguidance"):
    pytest.importorskip(library)

import httpx  # noqa: E402
import uvicorn  # noqa: E402

from polybit.serve.app import ServerState, make_app  # noqa: E402
from polybit.serve.server import Server, open_socket  # noqa: E402

WIDTHS = ("w8", "w4", "w3", "w2")


def tinychat():
    """(model, tokenizer) at nested widths, in a second."""
    model, tokenizer = open_model("tinychat")
    chosen = targets(model, include_embeddings=True)
    convert(model, {t.name: pack(rtn(t.weight_OI(model), None, Grid(8, 32, "group"), search=False)) for t in chosen})
    model.config.quantization_config = {"widths": [int(width[1:]) for width in WIDTHS]}
    return model.eval(), tokenizer


@pytest.fixture(scope="session")
def rounded():
    return tinychat()


def make_service(rounded, **more):
    return service_of(*rounded, "tinychat", **more)


@contextmanager
def serving(state, *, shared=False, **more):
    """The address of a server in a thread; it is stopped in the end. shared: another server has its service too."""
    app = make_app(state, **more)
    config = uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=2)
    server = Server(config, state, 2.0)
    listening = open_socket("127.0.0.1", 0)
    service, told = state.service, None
    if service is not None:
        told = service.note, service.first_seconds
        service.note, service.first_seconds = state.metrics.note, state.metrics.first.observe
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        if service is not None and told is not None:
            service.note, service.first_seconds = told  # of the server that has it too
        if shared:
            state.service = None
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server does not stop"


@pytest.fixture(scope="session")
def service(rounded):
    return make_service(rounded, context=512, slots=4, queue=40)


@pytest.fixture(scope="session")
def address(service):
    state = ServerState(service=service)
    with serving(state) as base:
        yield base


@pytest.fixture
def web(address):
    with httpx.Client(base_url=address, timeout=30) as client:
        yield client


def idle(service, seconds=10.0):
    """Wait until nothing is answered any more; False when that does not come."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not service.engine.running and not service.engine.waiting:
            return service.engine.slots.free == len(service.engine.slots.slots)
        time.sleep(0.01)
    return False


def raw(address):
    """A bare connection."""
    host, port = address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)
