"""Workers that are actors of a Ray cluster: the one door to ray."""

from __future__ import annotations

import socket
from typing import Any

import torch

from polybit.core.runtime import PolybitError
from polybit.hub.crew import Greeting, Make, Seen, Word, versions

ANSWER = 5.0  # seconds in which a cluster must answer
HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)  # of HTTP/2, which Ray's head speaks
TOKEN = ", where it asks for a token, set RAY_AUTH_MODE=token beside what ray get-auth-token says"
SETTINGS = 4  # kind of the first frame of every HTTP/2 server


class Actors:
    """An actor per worker; see hub.crew.Crew.

    Each claims as many CPUs as this process has threads, or as there are for it, and a GPU where the cluster has some.
    Those the cluster has no room for yet start when there is: a node that joins is put to work. Ray itself restarts
    nothing: who is gone is told, and the loop in hub.workers decides.
    """

    def __init__(self, make: Make, arguments: tuple[Any, ...], workers: int, address: str, seen: Seen) -> None:
        self.ray = opened()
        self.ours = connect(self.ray, address)
        self.told = self.ray.put((make, arguments, seen))  # once to every node, not once to every worker
        total = self.ray.cluster_resources()
        threads = max(1, min(torch.get_num_threads(), int(total.get("CPU", 1)) // workers))
        claims = {"num_cpus": threads, "num_gpus": 1 if total.get("GPU") else 0}
        self.actor: Any = self.ray.remote(hand(threads)).options(
            max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD", **claims
        )
        self.people: dict[int, Any] = {}
        self.awaited: dict[Any, int] = {}  # what is being computed -> by whom
        self.nodes: dict[int, str] = {}
        self.number = 0

    def hire(self) -> int:
        """An actor that starts as soon as there is room."""
        worker, self.number = self.number, self.number + 1
        self.people[worker] = self.actor.remote()
        self.awaited[self.people[worker].begin.remote(versions(), [self.told])] = worker
        return worker

    def give(self, worker: int, task: Any) -> None:
        """A call of the actor."""
        self.awaited[self.people[worker].do.remote(task)] = worker

    def hear(self, seconds: float) -> list[Word]:
        """Of all whose call has come back."""
        refs = list(self.awaited)
        done, _ = self.ray.wait(refs, num_returns=1, timeout=seconds)
        if done:
            done, _ = self.ray.wait(refs, num_returns=len(refs), timeout=0)
        return [self.word(ref) for ref in done]

    def word(self, ref: Any) -> Word:
        """What a call gave."""
        worker = self.awaited.pop(ref)
        try:
            kind, what = self.ray.get(ref)
        except self.ray.exceptions.RayActorError as error:
            self.ray.kill(self.people.pop(worker))  # one that only cannot be reached must not come back
            away = isinstance(error, self.ray.exceptions.ActorUnavailableError)
            return Word(worker, "gone", f"is gone ({first_line(error)})", blame=not away and self.node_lives(worker))
        except self.ray.exceptions.RayError as error:  # it cannot be built there, or its answer cannot be read
            return Word(worker, "failed", PolybitError(f"a worker of the Ray cluster failed ({cause(error)})"))
        if kind == "here":
            what, self.nodes[worker] = what
            what = Greeting(**what) if isinstance(what, dict) else what
        return Word(worker, kind, what)

    def node_lives(self, worker: int) -> bool:
        """Whether the node of a dead actor is there, so that the task may be to blame and not the node."""
        return self.nodes.get(worker) in {node["NodeID"] for node in self.ray.nodes() if node["Alive"]}

    def end(self) -> None:
        """All actors go; a connection or a cluster that was opened here goes too."""
        for actor in self.people.values():
            self.ray.kill(actor)
        self.people, self.awaited = {}, {}
        if self.ours:
            self.ray.shutdown()


def opened() -> Any:
    """The library."""
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise PolybitError(
            "spreading work over a cluster needs ray, which is not installed: run pip install 'polybit[cluster]', or "
            "use --workers alone for processes on this machine"
        ) from error
    return ray


def connect(ray: Any, address: str) -> bool:
    """Join the cluster, or begin one with "local"; whether that was done here."""
    if ray.is_initialized():
        return False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        ray.init(address="local", include_dashboard=False, **quiet)
        return True
    if (place := meant(address)) != "auto":
        check_answers(address, place)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, SystemExit) as error:  # ray ends the process where its head stops answering
        raise PolybitError(
            f"--ray {address}: no Ray cluster lets us in there ({first_line(error)}); start one with ray start --head, "
            f"give --ray local, or{TOKEN}"
        ) from error
    except RuntimeError as error:
        raise PolybitError(
            f"--ray {address}: the cluster cannot be joined ({first_line(error)}); it must run the same versions of "
            "ray and Python"
        ) from error
    return True


def meant(address: str) -> str:
    """What `auto` stands for: the cluster of the environment, or the one that was started or joined here last."""
    if address != "auto":
        return address
    from ray._private import services

    find = getattr(services, "canonicalize_bootstrap_address", None)  # no public name has it
    try:
        return (find and find(address)) or address
    except (ConnectionError, ValueError) as error:
        raise PolybitError(
            f"--ray auto: this machine belongs to no Ray cluster ({first_line(error)}); start one with ray start "
            "--head, or give its address"
        ) from error


def check_answers(asked: str, address: str) -> None:
    """Refuse an address where nobody answers as Ray does, before ray waits for two minutes and ends the process.

    asked: what the user gave
    """
    host, sign, port = address.removeprefix("ray://").rpartition(":")
    if not sign or not port.isdigit():
        raise PolybitError(f"--ray {address!r} is no address: give HOST:PORT, auto or local")
    named = asked if asked == address else f"{asked} (last at {address})"
    mend = "start the cluster with ray start --head, or mend the address"
    try:
        with socket.create_connection((host, int(port)), timeout=ANSWER) as opened:
            opened.sendall(HELLO)
            frame = opened.recv(9)
    except (OSError, OverflowError) as error:
        raise PolybitError(f"--ray {named} does not answer ({error}): {mend}") from error
    if len(frame) < 4 or frame[3] != SETTINGS:
        raise PolybitError(f"--ray {named}: what answers there is no Ray cluster; {mend}")


def cause(error: BaseException) -> str:
    """What an error of a task says; ray's own text begins with where it was."""
    found = getattr(error, "cause", None) or error
    return f"{type(found).__name__}: {first_line(found)}"


def first_line(error: BaseException) -> str:
    """What an error of ray says, shortened to one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]


def hand(threads: int) -> type:
    """The class of the actors, which travels by value: a node with another polybit can still say so."""

    class Hand:
        """One actor."""

        work: Any = None

        def begin(self, ours: Any, told: Any) -> tuple[str, Any]:
            """Greet; where the versions differ from `ours`, before what was sent is read, which may be impossible."""
            import socket

            import ray

            node = ray.get_runtime_context().get_node_id()
            try:
                from polybit.hub.crew import greet, ready, versions
            except ImportError as error:
                found = {"polybit": f"none that fits ({error})"}
                return "here", ({"host": socket.gethostname(), "versions": found}, node)
            if versions() != ours:
                return "here", ({"host": socket.gethostname(), "versions": versions()}, node)
            ready(threads)
            self.make, self.arguments, seen = ray.get(told[0])
            return "here", (greet(seen), node)

        def do(self, task: Any) -> tuple[str, Any]:
            """One task."""
            from polybit.hub.crew import portable

            try:
                self.work = self.work or self.make(*self.arguments)
                return "done", self.work(task)
            except BaseException as error:
                return "failed", portable(error)

    return Hand
