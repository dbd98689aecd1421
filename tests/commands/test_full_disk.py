"""A disk that fills up at any file of a verb: one sentence, and what was there before stays, whole."""

import subprocess
from contextlib import redirect_stderr

import pytest

from polybit.cli import main
from tests.commands.killed_verbs import VERBS as RUNS
from tests.commands.killed_verbs import content
from tests.commands.test_killed import room  # noqa: F401 - a fixture
from tests.killed import forked

pytestmark = pytest.mark.slow
VERBS = ("export dense", "export mlx", "export gguf", "quantize", "pairs", "align", "report")
SIZES = 24
PAGE = 4096


@pytest.fixture
def disk(tmp_path):
    """A file system in memory; a function gives it a number of bytes."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield place, lambda count: subprocess.run(["mount", "-o", f"remount,size={count}", place], check=True)
    finally:
        subprocess.run(["umount", place], check=True)


def said(work, heard):
    """(whether a child ended as it should, what it said on stderr)."""

    def talking():
        with heard.open("w") as opened, redirect_stderr(opened):
            work()

    return forked(talking) == 0, heard.read_text()


@pytest.mark.parametrize("verb", VERBS)
def test_a_full_disk_is_one_sentence_wherever_it_fills_up(verb, room, disk, tmp_path):  # noqa: F811
    place, give = disk
    out = RUNS[verb].out(place)
    work = lambda: main(RUNS[verb].command(room, place))  # noqa: E731
    assert forked(work) == 0
    whole = content(out)
    used = sum(path.stat().st_blocks * 512 for path in place.rglob("*") if path.is_file())
    sentences = set()
    for size in range(1, SIZES + 1):
        for path in place.iterdir():
            path.unlink() if path.is_file() else subprocess.run(["rm", "-r", path], check=True)
        give(max(PAGE, used * size // SIZES // PAGE * PAGE))
        done, heard = said(work, tmp_path / "heard")
        if done:
            assert content(out) == whole
            continue
        lines = [line for line in heard.splitlines() if "warning:" not in line]
        assert len(lines) == 1 and lines[0].startswith("polybit: ") and "full" in lines[0], heard
        assert not out.exists()
        sentences.add(lines[0])
    assert sentences
    give(64 << 20)
    assert forked(work) == 0
    assert content(out) == whole
