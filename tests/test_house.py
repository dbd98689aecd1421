"""The plan of the house is a test: who may import whom, and which third-party library enters by which door."""

import ast
import re
import subprocess
import sys
from itertools import pairwise
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
    "quant": CORE | {"quant", "kernels"},
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
    "datasets": ("data/files.py",),
    "scipy": ("allocate/knapsack.py",),
    "ray": ("hub/cluster.py",),
    "triton": ("kernels/",),
    "gguf": ("export/gguf.py", "hub/gguf_header.py", "speed/llama.py"),
    "llama_cpp": ("speed/llama.py",),
    "matplotlib": ("report/plots.py",),
    "openai": ("hub/endpoint.py",),
    "lm_eval": ("evals/lm_eval_bridge.py",),
    "jinja2": ("report/", "serve/template_worker.py"),
    "fastapi": ("serve/app.py",),
    "starlette": ("serve/app.py",),
    "sse_starlette": ("serve/app.py",),
    "uvicorn": ("serve/server.py",),
    "prometheus_client": ("serve/metrics.py",),
    "llguidance": ("serve/grammar.py",),
    "pydantic": ("serve/",),
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


def internal(path: Path) -> set[str]:
    """The files of the package that a file imports when it is loaded or later, as dotted modules."""
    found = set()
    for name in imports(path):
        if name.startswith("polybit."):
            found |= {name, name.rpartition(".")[0]} & MODULES.keys()
    return found - {module_name(path)}


def module_name(path: Path) -> str:
    """polybit/core/plan.py -> polybit.core.plan."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of more than one node that reach each other (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return found


def test_no_two_files_import_each_other():
    """No circle anywhere, imports inside functions counted."""
    packages = {module_name(path) for path in FILES if path.name == "__init__.py"}
    graph = {name: internal(path) - packages for name, path in MODULES.items() if name not in packages}
    assert not circles(graph)


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]


def functions(path: Path) -> list[tuple[str, int]]:
    """(name, lines) of every function and method of a file."""
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [(n.name, n.end_lineno - n.lineno + 1) for n in ast.walk(tree) if isinstance(n, kinds)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sizes(path):
    """A file has at most 400 lines, a verb's 150, a function 60."""
    most = 150 if path.parent.name == "commands" else 400
    lines = path.read_text().count("\n")
    assert lines <= most, f"{path.name} has {lines} lines, more than {most}"
    long = [f"{name}: {size}" for name, size in functions(path) if size > 60]
    assert not long, f"functions of more than 60 lines in {path.name}: {', '.join(long)}"


def test_class_names_are_unique():
    """One word, one thing: a class can be found, and spoken of, by its name alone."""
    where: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    twice = {name: files for name, files in where.items() if len(files) > 1}
    assert not twice


def test_file_names_do_not_nearly_repeat():
    """No allocate beside allocation: in one room no file's name is another's with an ending."""
    for room in {path.parent for path in FILES}:
        stems = sorted(path.stem for path in room.glob("*.py") if path.stem != "__init__")
        for stem, after in pairwise(stems):
            close = after.removeprefix(stem.rstrip("e"))
            assert close not in ("d", "ed", "ion", "ation", "ing"), f"{room.name}: {stem} and {after}"


def rooms_of(page: str) -> dict[str, str]:
    """The paragraphs of docs/house.md under `### room: …`; the last one, of the package itself, as ""."""
    parts = re.split(r"^### (.+)\n", page.partition("## Rooms")[2].partition("\n## ")[0], flags=re.MULTILINE)[1:]
    return {
        title.partition(":")[0] if ":" in title else "": text
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    }


def test_the_house_page_names_every_file():
    """Each file stands in its room's paragraph, and no file that is gone."""
    rooms = rooms_of((ROOT / "docs" / "house.md").read_text())
    names: dict[str, set[str]] = {}
    for path in FILES:
        inside = path.relative_to(PACKAGE).parts
        if path.name != "__init__.py":
            names.setdefault(inside[0] if len(inside) > 1 else "", set()).add(path.stem)
    for room, stems in names.items():
        said = set(re.findall(r"`(\w+)`", rooms.get(room, "")))
        assert not stems - said, f"docs/house.md does not name {sorted(stems - said)} of {room or 'the package'}"
        assert room == "" or not said - stems, f"docs/house.md names {sorted(said - stems)}, not in {room}"


def test_verbs_wrap_the_library():
    """A file of commands imports flags and printing at the top, and the act late and once."""
    for path in sorted((PACKAGE / "commands").glob("*.py")):
        tree = ast.parse(path.read_text())
        top = {id(node) for node in tree.body}
        late = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and id(node) not in top and str(node.module).startswith("polybit.acts")
        ]
        assert len(late) <= 1, f"commands/{path.name} imports {len(late)} acts late"
        early = [
            n.module for n in tree.body if isinstance(n, ast.ImportFrom) and str(n.module).startswith("polybit.acts")
        ]
        assert not early, f"commands/{path.name} imports {early} before it is called: --help would load torch"


def test_nothing_outside_the_package_imports_commands():
    """Benchmarks, recipes and examples use the library."""
    for folder in ("benchmarks", "recipes", "examples"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not any(name.startswith("polybit.commands") for name in imports(path)), path


def test_tables_load_no_torch():
    code = "import sys\n" + "".join(
        f"import {name}\n" for name in MODULES if name.endswith(".table") or name.startswith("polybit.options")
    )
    code += "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_polybit_loads_no_torch():
    code = "import sys, polybit; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'"
    subprocess.run([sys.executable, "-c", code], check=True)
