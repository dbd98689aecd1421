"""Hooks of mkdocs: the front page, files beside docs/ that pages link to, the list of results, a reference per room.

Pages are written to be read in the repository too, so links go where files lie there. A Markdown file outside docs/
that a page links to becomes a page of the site, any other file is copied into source/; the links follow.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
MARK = re.compile(r"^(## .+)$|<!-- index: (.+?) -->", re.MULTILINE)
FRONT = {"README.md": "index.md"}
ROOMS = {  # page of the reference: its title, and the modules it shows
    "library": ("polybit", ["polybit.library", "polybit.nn.switch"]),
    "options": ("Options of the acts", ["polybit.options"]),
    "core": ("core", [f"polybit.core.{name}" for name in ("precision", "plan", "records", "affine", "planes", "cost",
                                                          "journal", "runtime")]),
    "kernels": ("kernels", ["polybit.kernels.ops", "polybit.kernels.reference"]),
    "quant": ("quant", ["polybit.quant"]),
    "nn": ("nn", [f"polybit.nn.{name}" for name in ("linear", "convert", "operands", "adapters", "rotation")]),
    "hub": ("hub", [f"polybit.hub.{name}" for name in ("models", "load", "checkpoint", "lm", "cache", "dense")]),
    "data": ("data", [f"polybit.data.{name}" for name in ("files", "turns", "text", "chat", "prompts")]),
    "compress": ("compress", ["polybit.compress.loop", "polybit.compress.recipe"]),
    "measure": ("measure", ["polybit.measure"]),
    "evals": ("evals", ["polybit.evals.metrics", "polybit.evals.table"]),
    "export": ("export", ["polybit.export.table"]),
}  # fmt: skip


def on_config(config: Any) -> Any:
    """The two parts of the navigation that follow from other files."""
    made = {"RESULTS": results(), "API": [{title: f"api/{name}.md"} for name, (title, _) in ROOMS.items()]}
    config.nav = [{title: made.get(entry, entry) if isinstance(entry, str) else entry for title, entry in part.items()}
                  for part in config.nav]  # fmt: skip
    return config


def results() -> list[Any]:
    """The pages of results under the headings of their index."""
    nav: list[Any] = ["results/README.md"]
    for heading, index in MARK.findall((DOCS / "results" / "README.md").read_text()):
        if heading:
            nav.append({heading.removeprefix("## "): []})
        else:
            next(iter(nav[-1].values())).extend(f"results/{page}.md" for page in index.split())
    return [part for part in nav if isinstance(part, str) or next(iter(part.values()))]


def site_name(path: Path) -> str:
    """Where a file of the repository is found in the site, from docs/."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    name = path.relative_to(ROOT).as_posix()
    if path.suffix == ".md":
        return FRONT.get(name, name.lower())
    return f"source/{name}.txt"


def linked(text: str, folder: Path) -> list[Path]:
    """Files outside docs/ that a page in `folder` links to."""
    found = (folder / target for _, target, _ in LINK.findall(FENCED.sub("", text)) if ":" not in target)
    paths = [Path(os.path.normpath(path)) for path in found]
    return [path for path in paths if path.is_file() and not path.is_relative_to(DOCS)]


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to outside docs/, and the reference."""
    waiting = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
    seen: set[Path] = set()
    for page in DOCS.rglob("*.md"):
        waiting += linked(page.read_text(), page.parent)
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        files.append(File.generated(config, site_name(path), content=path.read_text()))
        if path.suffix == ".md":
            waiting += linked(path.read_text(), path.parent)
    for name, (title, modules) in ROOMS.items():
        files.append(File.generated(config, f"api/{name}.md", content=reference(title, modules)))
    return files


def reference(title: str, modules: list[str]) -> str:
    """A page of mkdocstrings: each module, or each of a package, with what it defines and explains."""
    shown = [name for module in modules for name in files_of(module)]
    return f"# {title}\n\n" + "\n\n".join(map(section, shown)) + "\n"


def files_of(module: str) -> list[str]:
    """The modules of a package; a module alone is itself."""
    path = ROOT / module.replace(".", "/")
    if not path.is_dir():
        return [module]
    return [f"{module}.{file.stem}" for file in sorted(path.glob("*.py")) if file.stem != "__init__"]


def section(module: str) -> str:
    """What is defined in a module, public and described."""
    if module == "polybit.library":
        return acts()
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = [n.name for n in tree.body if isinstance(n, kinds) and n.name[0] != "_" and ast.get_docstring(n)]
    said = ast.get_docstring(tree) or ""
    shown = "\n\n".join(f"::: {module}.{name}\n    options:\n      heading_level: 3" for name in names)
    return f"## {module}\n\n{said}\n\n{shown}"


def acts() -> str:
    """The acts, whose signatures are made when they are imported: as Python sees them, with every option explained."""
    import inspect

    import polybit

    parts = []
    for name, where in polybit._PUBLIC.items():
        if where == "polybit.library":
            function = getattr(polybit, name)
            summary, _, options = inspect.getdoc(function).partition("\n\n")
            rows = "\n".join(f"- `{key}`: {text}" for key, _, text in (o.partition(": ") for o in options.splitlines()))
            parts.append(f"### polybit.{name}\n\n{summary}\n\n{rows}\n")
    return "Every act takes a model and these keywords, and returns a `Run`.\n\n" + "\n".join(parts)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of the repository become links of the site."""
    source = {site_name(path): path for path in map(ROOT.joinpath, ("README.md",))}.get(page.file.src_uri)
    folder = source.parent if source else repository_folder(page.file.src_uri)
    here = Path(page.file.src_uri).parent

    def moved(match: re.Match[str]) -> str:
        target = match[2]
        path = Path(os.path.normpath(folder / target))
        if re.match(r"[a-z]+:", target) or not path.exists():
            return match[0]
        if path.is_dir():
            path = path / "README.md" if (path / "README.md").exists() else DOCS / "results" / "README.md"
        return match[1] + os.path.relpath(site_name(path), here).replace(os.sep, "/") + match[3]

    return LINK.sub(moved, markdown)


def repository_folder(uri: str) -> Path:
    """The folder in the repository of a page of the site."""
    if (DOCS / uri).exists():
        return (DOCS / uri).parent
    named = {
        path.relative_to(ROOT).as_posix().lower(): path for path in (*ROOT.glob("*.md"), *ROOT.rglob("recipes/**/*.md"))
    }
    return named[uri].parent if uri in named else DOCS / Path(uri).parent
