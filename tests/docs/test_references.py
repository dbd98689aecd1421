"""What docs say of the code is there: every file they name, and every function after `file: `."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGES = ["docs/papers.md", "docs/format.md", "docs/house.md", "CONTRIBUTING.md"]
FILE = r"(?:[a-z_]\w*/)+\w+\.(?:py|cpp|h)"
REFERENCE = re.compile(rf"(?<![\w/])({FILE})`?(?::((?:,? `[^`]+`)+))?")


def place(name: str) -> Path:
    """Where a file named on a page lies: from the root, or from the package."""
    return ROOT / name if (ROOT / name).exists() else ROOT / "polybit" / name


def defined(path: Path) -> set[str]:
    """Names a file defines at its top, and `Class.method`."""
    if path.suffix != ".py":
        return set(re.findall(r"\w+", path.read_text()))
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            found |= {f"{node.name}.{n.name}" for n in ast.walk(node) if isinstance(n, ast.FunctionDef)}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return found


def references(text: str) -> list[tuple[str, str]]:
    """(file, name) of every reference; name "" for the file alone. Placeholders in capitals are none."""
    found = []
    for file, names in REFERENCE.findall(text):
        called = [re.split(r"[(]", name)[0] for name in re.findall(r"`([^`]+)`", names)]
        found += [(file, name) for name in called or [""]]
    return [(file, name) for file, name in found if "NAME" not in file and "clipped" not in file]


@pytest.mark.parametrize("page", PAGES)
def test_every_reference_resolves(page):
    for file, name in references((ROOT / page).read_text()):
        assert place(file).is_file(), f"{page} names {file}, which is not there"
        assert not name or name in defined(place(file)), f"{page} names {name} of {file}, which has no such name"


def test_references_are_found():
    text = "quant/rtn.py, train/cascade.py: `cdt`, `Cascade(1)` and `polybit/hub/checkpoint.py` but not quant/NAME.py"
    assert references(text) == [
        ("quant/rtn.py", ""),
        ("train/cascade.py", "cdt"),
        ("train/cascade.py", "Cascade"),
        ("polybit/hub/checkpoint.py", ""),
    ]


def test_pages_named_in_comments_are_there():
    """`docs/….md` in the package, the tests, benchmarks and recipes."""
    for folder in ("polybit", "tests", "benchmarks", "recipes"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".toml", ".h", ".cpp") and path.name != Path(__file__).name:
                for name in re.findall(r"(?<![\w/])docs/(?:[a-z0-9-]+/)*[a-z0-9-]+\.(?:md|json)", path.read_text()):
                    assert (ROOT / name).is_file(), f"{path.relative_to(ROOT)} names {name}"
