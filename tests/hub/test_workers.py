"""Work spread over processes: every task once, errors reach the caller, ray only when it is there."""

import builtins
import sys
import types

import pytest

from polybit.core.runtime import PolybitError
from polybit.hub.workers import spread


class Squarer:
    """A worker that must be built once per process."""

    def __init__(self, offset):
        self.offset, self.built = offset, True

    def __call__(self, task):
        if task == 13:
            raise PolybitError("thirteen is not possible: choose another")
        return task * task + self.offset


def test_one_worker_works_here_and_in_order():
    assert list(spread(Squarer, (1,), [3, 1, 2])) == [10, 2, 5]
    assert list(spread(Squarer, (1,), [])) == []


def test_several_processes_do_every_task_once():
    assert sorted(spread(Squarer, (1,), list(range(7)), workers=2)) == [n * n + 1 for n in range(7)]


def test_an_error_reaches_the_caller():
    with pytest.raises(PolybitError, match="thirteen"):
        list(spread(Squarer, (0,), [1, 13]))


def test_no_workers_are_refused():
    with pytest.raises(PolybitError, match="--workers 0"):
        list(spread(Squarer, (0,), [1], workers=0))


def test_a_missing_ray_is_one_sentence(monkeypatch):
    plain = builtins.__import__

    def refuse(name, *rest, **named):
        if name.startswith("ray"):
            raise ImportError(name)
        return plain(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(PolybitError, match="needs ray, which is not installed"):
        list(spread(Squarer, (0,), [1], ray=True))


def test_ray_gets_one_actor_per_worker_and_every_task(monkeypatch):
    """A stand-in with ray's calls; the real one is tried where it is installed."""
    made = []

    class Pool:
        def __init__(self, actors):
            self.actors = actors

        def map_unordered(self, do, tasks):
            return [do(self.actors[n % len(self.actors)], task) for n, task in enumerate(tasks)]

    def remote(kind):
        class Actor:
            def remote(self):
                worker = kind()
                made.append(worker)
                return types.SimpleNamespace(do=types.SimpleNamespace(remote=worker.do))

        return Actor()

    ray = types.ModuleType("ray")
    ray.remote, ray.is_initialized, ray.init = remote, lambda: True, lambda **_: None
    util = types.ModuleType("ray.util")
    util.ActorPool = Pool
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.util", util)
    assert list(spread(Squarer, (1,), [1, 2, 3], workers=2, ray=True)) == [2, 5, 10]
    assert len(made) == 2
