"""kill -9 at moments spread over each verb that writes: what was there stays or the new is there, whole; the same
command again ends in the same bytes, and nothing is left beside it.

A child is forked for every moment from a process that has run the verb once: it has all imports, and the rest of the
run is its own."""

import os
import shutil
from functools import partial

import pytest

from polybit.cli import main
from tests.commands.killed_verbs import VERBS, Room, content, listing
from tests.hub.endpoint import serve
from tests.killed import forked, killed_at, moments

POINTS, SOON = 50, 2
NOW = ("export mlx", "pairs")
CASES = [pytest.param(v, SOON if n == 0 else POINTS, marks=pytest.mark.slow if n or v not in NOW else ())
         for v in VERBS for n in (0, 1)]  # fmt: skip
CONFIG = "config.json"  # every checkpoint has one
PART = os.environ.get("KILLED_PART", "1/1")  # as in 2/3: the second of every three moments


@pytest.fixture(scope="module")
def room(tiny_llama, tmp_path_factory):
    """Good inputs of the verbs, and a judge that is torn."""
    folder = tmp_path_factory.mktemp("killed")
    with serve(lambda messages: "Rating: [[7]]" if "assistant A" not in messages[-1]["content"] else "[[C]]") as judge:
        found = Room(folder, tiny_llama)
        found.judge = judge.url
        yield found


def forget(place, names):
    """As if the verb had never run."""
    for path in [place / name for name in names]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def is_begun(found, whole):
    """Whether it is the whole, or some of its checkpoints, each whole."""
    if found == whole:
        return True
    several = isinstance(whole, dict) and all(isinstance(each, dict) and CONFIG in each for each in whole.values())
    return several and all(found[name] == whole[name] for name in found)


@pytest.mark.parametrize(("verb", "points"), CASES)
def test_killed_at_any_moment_nothing_is_lost(verb, points, room, tmp_path, monkeypatch):
    part, place = VERBS[verb], tmp_path / "place"
    place.mkdir()
    monkeypatch.setenv("POLYBIT_CACHE", str(place / "machine"))
    read = partial(content, place, timed=part.timed)
    part.begins(room, place)
    out = part.out(place)
    names = [out.name, *part.also]
    work = lambda: main(part.command(room, place))  # noqa: E731
    work()  # here, so that the children need import nothing
    whole, lies = read(), listing(place)
    forget(place, names)
    count = moments(work, tmp_path / "count")
    assert read() == whole and count > 20
    killed, (share, shares) = 0, map(int, PART.split("/"))
    chosen = range(share - 1, points, shares)
    for point in chosen:
        if not part.over or point % 2:
            forget(place, names)  # else what is there is written over
        before = read()
        killed += killed_at(1 + (count - 1) * (2 * point + 1) // (2 * points), work)
        found = read()  # every file that is there is whole
        for name in names:
            if name in before:
                assert name in found, f"{name} is lost"
            if name in found and (part.ending or part.anew):
                assert found[name] == before.get(name) or is_begun(found[name], whole[name])
        if not (part.anew and found == whole):  # what is finished is refused
            assert forked(work) == 0, "the same command does not go on"
            assert listing(place) == lies
        assert read() == whole
    assert killed >= len(chosen) * 0.8, f"{killed} of {len(chosen)} runs lived until they were killed"
    forget(place, names)
    assert forked(work) == 0  # what the killed ones left is in nobody's way, and goes
    assert read() == whole and listing(place) == lies
