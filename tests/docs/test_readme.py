"""The Python on the pages is real: it parses, and every call of `polybit.…` has the names and options it uses."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import polybit

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [path for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")) if "\n```python" in path.read_text()]


def calls(source: str) -> list[ast.Call]:
    """Calls of attributes of `polybit`."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [c for c in found if isinstance(c.func, ast.Attribute) and ast.unparse(c.func.value) == "polybit"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_calls_can_be_made(path):
    for block in BLOCK.findall(path.read_text()):
        if "def " in block and "->" in block and path.name == "house.md":
            continue  # signatures, written to be read
        for call in calls(block if not block.startswith('"') else f"{{{block}}}"):
            function = getattr(polybit, call.func.attr)
            inspect.signature(function).bind(*call.args, **{key.arg: key.value for key in call.keywords})


def test_the_library_on_the_front_page_is_whole():
    """The acts README shows in a notebook are there, with their options as keywords."""
    shown = {call.func.attr for block in BLOCK.findall((ROOT / "README.md").read_text()) for call in calls(block)}
    assert {"quantize", "evaluate", "use", "at"} <= shown
    with pytest.raises(TypeError):
        inspect.signature(polybit.evaluate).bind("my-model", references="tinychat")


def test_the_page_of_the_library_names_every_act():
    acts = {name for name, where in polybit._PUBLIC.items() if where == "polybit.library"}
    table = [line.split("|")[1] for line in (ROOT / "docs" / "library.md").read_text().splitlines() if "| `" in line]
    assert acts <= set(re.findall(r"`(\w+)`", " ".join(table)))
