"""The plan of the house is a test: who may import whom, and which third-party library enters by which door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "polybit"

CORE = {"core"}
MIDDLE = {"core", "kernels", "quant", "data", "nn", "hub"}
TABLES = "table"  # the torch-free table of a room's parts, open to every room
ALLOWED = {  # room -> rooms it may import, beside every room's table
    "core": CORE,
    "kernels": CORE | {"kernels"},
    "quant": CORE | {"quant"},
    "allocate": CORE | {"allocate"},
    "data": CORE | {"data"},
    "report": CORE | {"report"},
    "nn": CORE | {"nn", "quant", "kernels"},
    "hub": MIDDLE,
    "compress": MIDDLE | {"compress"},
    "speed": MIDDLE | {"speed"},
    "measure": MIDDLE | {"compress", "measure"},
    "evals": MIDDLE | {"evals"},
    "robust": MIDDLE | {"robust"},
    "export": MIDDLE | {"export"},
    "serve": MIDDLE | {"serve"},
    "train": MIDDLE | {"train", "robust"},
    "options": CORE | {"options"},
}
ALLOWED["acts"] = {*ALLOWED, "acts"}
ALLOWED["commands"] = CORE | {"commands", "options", "acts", "report"}
DOORS = {  # third-party library -> the files or rooms that may import it
    "transformers": ("hub/", "train/trainer.py"),
    "tokenizers": ("hub/",),
    "safetensors": ("hub/", "export/"),
    "datasets": ("data/text.py",),
    "scipy": ("allocate/knapsack.py",),
    "ray": ("hub/workers.py",),
    "triton": ("kernels/",),
    "gguf": ("export/gguf.py", "speed/llama.py"),
    "llama_cpp": ("speed/llama.py",),
    "matplotlib": ("report/plots.py",),
    "openai": ("evals/judge_client.py",),
    "lm_eval": ("evals/lm_eval_bridge.py",),
    "jinja2": ("report/",),
    "fastapi": ("serve/server.py",),
    "uvicorn": ("serve/server.py",),
    "cyclopts": ("cli.py", "commands/"),
    "rich": ("core/runtime.py", "cli.py", "report/"),
}
FILES = sorted(p for p in PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(".relative")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_order(path):
    inside = path.relative_to(PACKAGE)
    names = imports(path)
    assert ".relative" not in names, f"{inside}: import by full name, so that the room is visible"
    if len(inside.parts) > 1:
        allowed = ALLOWED[inside.parts[0]]
        rooms = {
            n.split(".")[1]
            for n in names
            if n.startswith("polybit.") and n.count(".") >= 2 and n.split(".")[2] != TABLES
        }
        assert rooms <= allowed, (
            f"{inside} imports {sorted(rooms - allowed)}; {inside.parts[0]} may import {sorted(allowed)}"
        )
    for library, doors in DOORS.items():
        if any(n == library or n.startswith(library + ".") for n in names):
            assert str(inside).startswith(doors), f"{inside} imports {library}; its door is {doors}"


def test_this_test_can_fail(tmp_path):
    """The walker sees imports inside functions too."""
    (tmp_path / "x.py").write_text("def f():\n    from transformers import AutoModel\n")
    assert imports(tmp_path / "x.py") == {"transformers.AutoModel"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_first_line_says_what_the_file_is(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path.name} has no docstring"


def test_importing_polybit_loads_no_torch():
    code = "import sys, polybit; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True)
