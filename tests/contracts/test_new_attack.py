"""A new attack is one file and one table line: the command line, the terminal table and the page take it."""

import json
import os
import subprocess
import sys

import pytest

from polybit.hub.checkpoint import save
from tests.robust.models import chat

FILE = '''
def shout(victim, cases, budget, allowed, *, seed=0):
    """Every free token becomes the same one."""
    return [case.with_tokens([allowed[0]] * len(case.free)) for case in cases]
'''
LINE = """
import sys
from polybit.robust.table import ATTACKS, Attack
ATTACKS["shout"] = Attack("shout:shout", "one loud token", "tokens", gradient=False)
from polybit.cli import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def polybit(tmp_path_factory):
    """`polybit`, as it would be with the file and the line; gives the finished process."""
    folder = tmp_path_factory.mktemp("new")
    (folder / "shout.py").write_text(FILE)

    def run(*words):
        paths = os.pathsep.join([str(folder), *filter(None, sys.path)])
        command = [sys.executable, "-c", LINE, *map(str, words)]
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)

    return run


def test_help_and_refusals_know_it(polybit):
    assert "shout = one loud token" in " ".join(polybit("attack", "--help").stdout.replace("│", " ").split())
    assert '"shout"' in polybit("attack", "x", "--method", "magic").stderr


def test_it_runs_and_stands_in_table_and_page(polybit, tmp_path):
    lm = chat()
    save(lm.model, tmp_path / "chat", tokenizer=lm.tokenizer, widths=(8, 3))
    few = ["--items", "2", "--precision", "w8,w3", "--tokens", "2", "--max-tokens", "4"]
    kept = ["--json", tmp_path / "a.json", "--report", tmp_path / "a.html"]
    done = polybit("attack", tmp_path / "chat", "--method", "shout", *few, *kept)
    assert not done.returncode, done.stderr
    assert "all widths" in done.stdout and "drawn per prompt" in done.stdout
    run = json.loads((tmp_path / "a.json").read_text())
    assert run["config"]["method"] == "shout" and set(run["numbers"]["matrix"]) >= {"w8", "w3", "all widths"}
    page = (tmp_path / "a.html").read_text()
    assert "method shout" in page and "one loud token" in page and "measures the loss" in page
