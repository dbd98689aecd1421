"""Work spread over processes and Ray: every task once, errors reach the caller, whoever dies is replaced."""

import builtins
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from polybit.core import nursery
from polybit.core.runtime import PolybitError
from polybit.hub import cluster, processes
from polybit.hub.crew import Greeting, Seen, check_gpus, check_greetings, greet, listing, versions
from polybit.hub.workers import Team, Where, spread


class Squarer:
    """A worker that must be built once per process; it can be told to fail, to die once, or always."""

    def __init__(self, offset, folder=None):
        self.offset, self.folder = offset, folder

    def __call__(self, task):
        if task == 13:
            raise PolybitError("thirteen is not possible: choose another")
        if task == 14:
            raise MemoryError("no room")
        mark = None if self.folder is None else self.folder / f"died-{task}"
        if (task == 5 and mark is not None and not mark.exists()) or task == 66:
            if mark is not None:
                mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return task * task + self.offset, os.getpid()


def squares(tasks, where=None, arguments=(1,), **more):
    """The squares by number of the task, and how many processes gave them."""
    found = dict(spread(Squarer, arguments, tasks, where=where or Where(), **more))
    return [found[n][0] for n in range(len(tasks))], {pid for _, pid in found.values()}


def test_one_worker_works_here_and_in_order():
    assert [value[0] for _, value in spread(Squarer, (1,), [3, 1, 2], where=Where())] == [10, 2, 5]
    assert squares([]) == ([], set())
    assert list(spread(Squarer, (1,), [3], where=Where(), here=lambda task: -task)) == [(0, -3)]


def test_processes_do_every_task_once_and_the_dead_are_replaced(tmp_path):
    with Team(Squarer, (1, tmp_path), Where(2)) as team:
        first = team.in_order(list(range(7)))
        assert [value for value, _ in first] == [n * n + 1 for n in range(7)]
        assert len({pid for _, pid in first}) <= 3 and (tmp_path / "died-5").exists()
        assert os.getpid() not in {pid for _, pid in first}
        again = team.in_order([2, 3])
        assert {pid for _, pid in again} <= {pid for _, pid in first}, "workers stay"
        with pytest.raises(PolybitError, match="thirteen"):
            team.in_order([1, 13, 2, 3])


@pytest.mark.slow
def test_a_task_that_kills_twice_ends_the_run_by_name():
    with pytest.raises(
        PolybitError, match=r"task 2 of 3 \(66\) ended its worker again and again, the last one was killed \(signal 9"
    ):
        squares([1, 66, 2], Where(2))
    with pytest.raises(PolybitError, match=r"ran out of memory \(no room\): give fewer --workers"):
        squares([14, 14], Where(2))


def test_what_differs_between_workers_is_one_sentence(tmp_path):
    here = greet(Seen({}))
    assert check_greetings([here, here]) == [here, here]
    with pytest.raises(PolybitError, match=r"worker on far has torch 1.0, and this process .*install the same"):
        check_greetings([here, Greeting("far", {**versions(), "torch": "1.0"})])
    with pytest.raises(PolybitError, match="polybit none that fits"):
        check_greetings([Greeting("far", {"polybit": "none that fits (no module)"})])
    with pytest.raises(PolybitError, match="does not see /models/x as this machine does: put it on a file system"):
        check_greetings([here, replace(here, unseen="/models/x")])
    with pytest.raises(PolybitError, match=r"GPUs differ: a has 24 GB and b 80 GB.*CUDA_VISIBLE_DEVICES"):
        check_gpus({"a": 24_000_000_000, "b": 80_000_000_000})
    (tmp_path / "weights").write_bytes(b"123")
    seen = Seen({str(tmp_path): listing(str(tmp_path))}, (str(tmp_path / "token"), "abc"))
    assert greet(seen).unseen == str(tmp_path)
    (tmp_path / "token").write_text("abc")
    assert greet(replace(seen, token=None)).unseen == str(tmp_path), "another file lies there now"
    assert greet(Seen({}, seen.token)).unseen is None


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(PolybitError, match="--workers 0"):
        Where(0)
    pytest.importorskip("ray")
    for address, said in (("127.0.0.1:1", "does not answer"), ("nonsense", "is no address")):
        began = time.monotonic()
        with pytest.raises(PolybitError, match=said):
            squares([1], Where(1, address))
        assert time.monotonic() - began < 10


def test_what_answers_and_is_no_cluster_is_refused_at_once(monkeypatch):
    pytest.importorskip("ray")
    with socket.socket() as taken, pytest.raises(PolybitError, match="what answers there is no Ray cluster"):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        threading.Thread(target=lambda: taken.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")).start()
        squares([1], Where(1, address))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(PolybitError, match=r"--ray auto \(last at .*:1\) does not answer"):
        squares([1], Where(1, "auto"))
    monkeypatch.setattr(cluster, "ANSWER", 0.2)
    with socket.socket() as silent, pytest.raises(PolybitError, match=r"does not answer \(timed out\)"):
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        squares([1], Where(1, f"127.0.0.1:{silent.getsockname()[1]}"))


def test_a_missing_ray_is_one_sentence(monkeypatch):
    plain = builtins.__import__

    def refuse(name, *rest, **named):
        if name.startswith("ray"):
            raise ImportError(name)
        return plain(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    with pytest.raises(PolybitError, match="needs ray, which is not installed"):
        squares([1], Where(1, "local"))


@pytest.mark.slow
def test_actors_of_a_ray_cluster_and_the_loss_of_one(tmp_path):
    pytest.importorskip("ray")
    found, workers = squares(list(range(8)), Where(2, "local"), (1, tmp_path), shared=tmp_path)
    assert found == [n * n + 1 for n in range(8)]
    assert os.getpid() not in workers and len(workers) <= 3 and (tmp_path / "died-5").exists()
    assert not list(tmp_path.glob(".seen-*"))
    with pytest.raises(PolybitError, match=r"task 2 of 3 \(66\) ended its worker again and again"):
        squares([1, 66, 2], Where(2, "local"))
    with pytest.raises(PolybitError, match="thirteen"):
        squares([13], Where(2, "local"))


class Begun:
    """A worker that tells what it has imported and computed before its first task, and whether threads work in it."""

    def __call__(self, threads):
        seconds, imported = time.process_time(), "transformers.models.llama.modeling_llama" in sys.modules
        torch.set_num_threads(threads)
        a = torch.full((512, 512), 1 / 512)
        return seconds, imported, float((a @ a).sum())


@pytest.mark.skipif(not nursery.FORKS or torch.cuda.device_count() > 0, reason="workers are not forked here")
def test_workers_have_imported_what_they_need_when_they_begin():
    a = torch.full((512, 512), 1.0)
    assert float((a @ a)[0, 0]) == 512, "this process has run threads"
    for seconds, imported, total in (found for _, found in spread(Begun, (), [1, 3, 3], where=Where(2))):
        assert imported and seconds < 1.0
        assert total == pytest.approx(512, rel=1e-4)


def test_only_workers_of_this_machine_have_a_process_to_be_forked_from(monkeypatch):
    begun = []
    monkeypatch.setattr(nursery, "begin", lambda *told: begun.append(told))
    nursery.warm(Where(1), "a")
    nursery.warm(Where(2, "local"), "a")
    assert not begun
    monkeypatch.setattr(nursery, "FORKS", True)
    nursery.warm(Where(2), "a")
    assert begun == [(2, "a")]
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert (nursery.threads_each(2), nursery.threads_each(3), nursery.threads_each(9)) == (2, 1, 1)


@pytest.mark.slow
def test_workers_that_cannot_start_are_one_sentence(monkeypatch):
    def refused(self):
        raise EOFError("unexpected EOF")

    monkeypatch.setattr("multiprocessing.context.ForkServerProcess.start", refused)
    with pytest.raises(PolybitError, match="no worker can be started"), Team(Squarer, (1,), Where(2)) as team:
        list(team.map([1, 2]))


def test_spawned_workers_give_the_same(monkeypatch):
    monkeypatch.setattr(processes, "FORKS", False)
    assert squares([3, 1, 2], Where(2))[0] == [10, 2, 5]


def test_copies_of_a_model_on_this_machine_are_those_of_its_workers_and_its_own():
    copies = {where: where.models for where in (Where(), Where(3), Where(3, "local"), Where(3, "10.0.0.5:6379"))}
    assert list(copies.values()) == [1, 4, 4, 1]
