"""Run the commands of docs/start.md, docs/real-model.md and docs/how/*.md and write what they say below them.

    python -m benchmarks.howto                      # every page anew
    python -m benchmarks.howto generate doctor      # these pages
    python -m benchmarks.howto --models DIR model   # a page that asks for a model: DIR has it, named as on the hub

In a block of `console`, lines with `$ ` are run by one shell in an empty folder; what stands between them is what they
said, stdout and stderr together. `<!-- before: COMMAND -->` is run first and not shown, and `<!-- model: NAME -->` asks
for a model that is not embedded. Names of folders of this machine are taken out. tests/docs/test_howto.py runs the same
and compares.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [DOCS / "start.md", DOCS / "real-model.md", *sorted((DOCS / "how").glob("[a-z]*.md"))]
CONSOLE = re.compile(r"^```console\n(.*?)^```", re.DOTALL | re.MULTILINE)
BEFORE = re.compile(r"^<!-- before: (.+?) -->$", re.MULTILINE)
MODEL = re.compile(r"^<!-- model: (\S+) -->$", re.MULTILINE)
MARK = "=+=+= {} =+=+="
LONGEST = 1500  # seconds of one page


class CommandFailed(Exception):
    """A command of a page ended with another status than the page says."""


def commands(block: str) -> list[str]:
    """The `$ ` lines of a block, continued ones joined as they stand."""
    found: list[str] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append(line[2:])
        elif found and found[-1].endswith("\\"):
            found[-1] += "\n" + line
    return found


def script(lines: list[str]) -> str:
    """A shell script that runs them and says before each which it is, and after each how it ended."""
    parts = [f"echo '{MARK.format(n)}'\n{line}\necho \"{MARK.format('$?')}\"" for n, line in enumerate(lines)]
    return "exec 2>&1\n" + "\n".join(parts) + "\nkill $(jobs -p) 2>/dev/null\nwait 2>/dev/null\n"


def environment(room: Path) -> dict[str, str]:
    """A home of its own, `polybit` on the path, plain text."""
    tools = room / "bin"
    tools.mkdir(exist_ok=True)
    (tools / "polybit").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m polybit "$@"\n')
    (tools / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("POLYBIT", "PYTEST"))}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return kept | {
        "HOME": str(room / "home"),
        "PATH": f"{tools}{os.pathsep}{kept['PATH']}",
        "PYTHONPATH": path,
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "120",
        "TERM": "dumb",
        "NO_COLOR": "1",
    }


def said(lines: list[str], room: Path, folder: Path) -> list[str]:
    """Run the lines in `folder`; what each said. Raises CommandFailed naming the first that failed."""
    (room / "home").mkdir(exist_ok=True)
    done = subprocess.run(
        ["bash", "-c", script(lines)],
        cwd=folder,
        env=environment(room),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        timeout=LONGEST,
    )
    shown = done.stdout.decode(errors="replace")  # with the carriage returns of progress, which text=True would replace
    outputs = []
    for n, line in enumerate(lines):
        after = shown.partition(MARK.format(n) + "\n")[2]
        found = re.search(re.escape(MARK).replace(r"\{\}", r"(\d+)"), after)
        if found is None or found[1] != "0":
            raise CommandFailed(f"$ {line}\n{after[:2000]}")
        outputs.append(tidy(after[: found.start()], room, folder))
    return outputs


def tidy(text: str, room: Path, folder: Path) -> str:
    """What a terminal shows in the end, without the names of this machine's folders."""
    lines = [re.sub(r"^.*\r(?=.)", "", line.rstrip("\r")).rstrip() for line in text.split("\n")]
    whole = "\n".join(lines).rstrip("\n")
    names = {str(folder): ".", str(room / "home"): "~", str(ROOT / "polybit"): "~/venv/lib/polybit"}
    names |= {sys.executable: "~/venv/bin/python", str(Path.home()): "~"}
    for name, short in names.items():
        whole = whole.replace(name, short)
    return re.sub(r"(?m)^\n(?=\n)", "", whole)


def prepared(text: str, room: Path, models: Path | None) -> Path:
    """An empty folder in which what the page needs before was run; the same needs are met once."""
    before = BEFORE.findall(text)
    pantry = room / f"pantry-{abs(hash(tuple(before)))}"
    if not pantry.exists():
        pantry.mkdir()
        said(before, room, pantry)
    folder = room / "work"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pantry, folder)
    for name in MODEL.findall(text):
        assert models is not None
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(models / Path(name).name)
    return folder


def written(text: str, outputs: list[str]) -> str:
    """The page with new outputs."""
    left = iter(outputs)

    def block(match: re.Match[str]) -> str:
        lines = []
        for command in commands(match[1]):
            output = next(left)
            lines.append(f"$ {command}\n" + (output + "\n" if output else ""))
        return "```console\n" + "".join(lines) + "```"

    return CONSOLE.sub(block, text)


def run_page(text: str, room: Path, models: Path | None = None) -> str:
    """The page as it is when its commands are run now."""
    lines = [command for block in CONSOLE.findall(text) for command in commands(block)]
    return written(text, said(lines, room, prepared(text, room, models)))


def can_run(text: str, models: Path | None) -> bool:
    """Whether the models a page asks for are here."""
    return all(models is not None and (models / Path(name).name).is_dir() for name in MODEL.findall(text))


def main() -> None:
    """Rewrite pages, each when it is done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="*", help="names without .md (default: all)")
    parser.add_argument("--models", type=Path, help="folder of models that are not embedded")
    options = parser.parse_args()
    chosen = [page for page in PAGES if not options.pages or page.stem in options.pages]
    with tempfile.TemporaryDirectory() as place:
        for page in chosen:
            text = page.read_text()
            if not can_run(text, options.models):
                print(f"{page.name}: left as it is, its model is not here", file=sys.stderr)
                continue
            page.write_text(run_page(text, Path(place), options.models))
            print(page.name, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
