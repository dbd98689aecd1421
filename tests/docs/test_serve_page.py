"""docs/serve.md: its table of fields is what the bodies of requests take, and every flag it names exists."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from polybit.options.serve import ServeOptions
from polybit.serve.anthropic_api import MessagesBody
from polybit.serve.fields import ChatBody, CompletionBody
from polybit.serve.responses_api import ResponsesBody

PAGE = (Path(__file__).parent.parent.parent / "docs" / "serve.md").read_text()
BODIES = (ChatBody, CompletionBody, ResponsesBody, MessagesBody)


def test_the_table_names_every_field_of_every_body():
    table = PAGE[PAGE.index("| field | chat") :].split("\n\n")[0]
    told = {body: set() for body in BODIES}
    for row in table.splitlines()[2:]:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        names = re.findall(r"`(\w+)`", cells[0])
        assert names and len(cells) == 6
        for body, mark in zip(BODIES, cells[1:5], strict=True):
            assert mark in ("", "✓")
            told[body] |= set(names if mark else ())
    for body, names in told.items():
        assert names == set(body.model_fields), body.__name__


def test_flags_of_the_page_exist():
    flags = {name.replace("_", "-") for name in (field.name for field in fields(ServeOptions))} | {"config", "out"}
    ours = re.sub(r"^lm_eval .*?^```", "", PAGE, flags=re.DOTALL | re.MULTILINE)  # its flags are lm-eval's
    assert set(re.findall(r"--([a-z][a-z-]*)", ours)) <= flags


PACKAGING = Path(__file__).parent.parent.parent / "packaging"


@pytest.mark.parametrize("path", [PACKAGING / "Dockerfile", PACKAGING / "polybit.service"], ids=lambda path: path.name)
def test_variables_and_flags_of_the_packages_exist(path):
    text, names = path.read_text(), {field.name for field in fields(ServeOptions)}
    told = set(re.findall(r"POLYBIT_SERVE_([A-Z_]+)", text)) | set(re.findall(r"POLYBIT_SERVE_([A-Z_]+)", PAGE))
    assert {"HOST", "API_KEY"} <= told and {name.lower() for name in told} <= names
    if path.suffix:
        started = re.search(r"^ExecStart=\S+ serve (.*)$", text, re.MULTILINE)
        assert started and set(re.findall(r"--([a-z-]+)", started[1])) <= {name.replace("_", "-") for name in names}


def test_lines_of_the_page_fit():
    assert all(len(line) <= 120 for line in PAGE.splitlines() if not line.startswith("|"))
