"""The pages of results: question, answer, a table from its JSON, command, limits; no link of the docs is dead."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks import howto, pages
from polybit.cli import build_app, take_config

ROOT = Path(__file__).parent.parent.parent
RESULTS = sorted(path for path in pages.RESULTS.glob("*.md") if path.name != "README.md")
READ = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
READ += sorted((ROOT / "recipes").rglob("*.md"))
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def read(path: Path) -> str:
    """The text of a page; the part that CONTRIBUTING.md adds is called by the name of one that exists."""
    return path.read_text().replace("clipped", "rtn") if path.name == "CONTRIBUTING.md" else path.read_text()


def commands(text: str) -> list[str]:
    """The `polybit …` lines of the code blocks of a page, with or without a prompt; what a shell adds is left out."""
    lines = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    typed = [line.removeprefix("$ ") for line in lines + pages_before(text)]
    return [re.split(r"  #| \|\| | > | & ", line)[0].strip() for line in typed if line.startswith("polybit ")]


def pages_before(text: str) -> list[str]:
    """What a how-to page runs before the commands it shows."""
    return howto.BEFORE.findall(text)


@pytest.mark.parametrize("path", pages.marked_pages(), ids=shown)
def test_tables_are_what_their_numbers_give(path):
    assert path.read_text() == pages.filled(path.read_text()), "run python -m benchmarks.pages"


@pytest.mark.parametrize("path", RESULTS, ids=shown)
def test_page_has_question_answer_table_command_and_limits(path):
    text = path.read_text()
    question, answer = pages.parts(text)
    assert text.startswith("# ") and question.endswith("?"), "the title is a question"
    assert answer.endswith(".") and len(answer) < 400 and not answer.startswith(("<!--", "#", "|")), "then the answer"
    tables = re.findall(r"<!-- table: (.+?) -->", text)
    assert 1 <= len(tables) <= 2, "one table, at most two"
    assert all(name.startswith(path.stem + ".") for name in tables), "its numbers stand under its own name"
    assert text.count("|\n| --- |") == len(tables), "every table stands between marks"
    command = text.partition("## Command\n")[2]
    assert BLOCK.findall(command.partition("\n## ")[0]), "the command, in a block"
    assert command.partition("## What it does not show\n")[2].strip(), "what it does not show"
    assert max(map(len, BLOCK.sub("", pages.MARKED.sub("", text)).splitlines())) <= 120


def test_every_page_is_in_the_index_once_and_every_json_has_a_page():
    listed = " ".join(re.findall(r"<!-- index: (.+?) -->", (pages.RESULTS / "README.md").read_text())).split()
    assert sorted(listed) == sorted(path.stem for path in RESULTS)
    assert sorted(path.stem for path in (pages.RESULTS / "data").glob("*.json")) == sorted(listed)


@pytest.mark.parametrize("path", READ, ids=shown)
def test_no_link_is_dead(path):
    text = BLOCK.sub("", path.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", link) and not link.startswith("#"):
            assert (path.parent / link.partition("#")[0]).exists(), f"{shown(path)}: {link} is not there"


@pytest.mark.parametrize("path", READ, ids=shown)
def test_commands_are_understood(path):
    """Every `polybit …` of a code block has a verb and flags that exist."""
    for line in commands(read(path)):
        tokens, config = take_config(shlex.split(line)[1:])
        build_app(config).parse_args(tokens, exit_on_error=False, print_error=False)


@pytest.mark.parametrize("path", [path for path in READ if path.name != "log.md"], ids=shown)
def test_files_named_are_there(path):
    for name in re.findall(r"(?<![\w/])((?:polybit|benchmarks|recipes|tests)/[\w/.-]*[\w/])", read(path)):
        assert (ROOT / name).exists() or (path.parent / name).exists(), f"{shown(path)} names {name}"


def test_these_tests_can_fail(tmp_path, monkeypatch):
    """A changed digit in a table is noticed, and numbers keep their digits."""
    page = pages.RESULTS / "demo.md"
    assert pages.filled(page.read_text().replace("0.043", "0.044")) == page.read_text()
    row = {"kl": pages.Written("0.1040"), "low": pages.Written("-0.10"), "best": ["kl"]}
    assert pages.cell(row, ["{kl} {missing}", "{kl} [{low:+}]"]) == "**0.1040** [−0.10]"
