"""The how-to pages are real: every verb has one, and its commands run and say what the page shows."""

import difflib
import re
from pathlib import Path

import pytest

from benchmarks import howto
from polybit.cli import COMMANDS

ROOT = Path(__file__).parent.parent.parent
SOON = ("doctor",)  # the others take from seconds to minutes
LIKE = 0.75  # of the words of the lines; answers and times differ from machine to machine


def shape(text: str) -> list[str]:
    """The words a page shows as output, without numbers, rules of tables and spaces."""
    shown = "\n".join(howto.CONSOLE.findall(text))
    return re.findall(r"[^\W\d_]{2,}", "\n".join(line for line in shown.splitlines() if not line.startswith("$ ")))


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=() if p.stem in SOON else pytest.mark.slow) for p in howto.PAGES],
    ids=lambda page: page.stem,
)
def test_commands_run_and_say_what_the_page_shows(page, tmp_path):
    text = page.read_text()
    if not howto.can_run(text, None):
        pytest.skip("its model is not here")
    now = howto.run_page(text, tmp_path)
    alike = difflib.SequenceMatcher(a=shape(text), b=shape(now), autojunk=False).ratio()
    assert alike >= LIKE, f"{alike:.2f} alike: run python -m benchmarks.howto {page.stem}"


def test_every_verb_has_a_page_that_runs_it():
    for verb in COMMANDS:
        lines = howto.CONSOLE.findall((ROOT / "docs" / "how" / f"{verb}.md").read_text())
        assert any(f"polybit {verb}" in line for block in lines for line in howto.commands(block)), verb


@pytest.mark.parametrize("page", howto.PAGES, ids=lambda page: page.stem)
def test_pages_show_output_and_no_folder_of_a_machine(page):
    text = page.read_text()
    assert shape(text), "run python -m benchmarks.howto"
    assert not re.search(r"(?<![\w~.:/])/(?:root|home|tmp|work|Users)\b", text)
    assert max(len(line) for line in howto.CONSOLE.sub("", text).splitlines() if not line.startswith("|")) <= 120


def test_a_command_that_fails_is_named(tmp_path):
    with pytest.raises(howto.CommandFailed, match="exit 3"):
        howto.run_page("```console\n$ echo fine\n$ (exit 3)\n```\n", tmp_path)
    page = "<!-- before: echo milk > jug -->\n```console\n$ cat jug\nold\n$ printf 'a\\rb' \\\n  && pwd\n```\n"
    assert "$ cat jug\nmilk\n$ printf" in (made := howto.run_page(page, tmp_path))
    assert made.endswith("  && pwd\nb.\n```\n"), "what a terminal shows, without this folder's name"
