"""A copy of the package to which a file and a line of a table were added, as somebody who adds a part would."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import polybit
from tests.apart import instead_of_installed

Command = Callable[..., subprocess.CompletedProcess[str]]


def grow(folder: Path, files: Mapping[str, str], lines: Mapping[str, tuple[str, str]]) -> Command:
    """`python WORDS` with such a package, most of it links, in `folder`; gives the finished process.

    files: path inside the package -> its text
    lines: table -> (the line before, the new line)
    """
    home = folder / "polybit"
    shutil.copytree(
        Path(polybit.__file__).parent, home, copy_function=os.symlink, ignore=shutil.ignore_patterns("__pycache__")
    )
    for name, text in files.items():
        (home / name).write_text(text)
    for name, (before, line) in lines.items():
        text = (home / name).read_text()
        assert text.count(before) == 1
        (home / name).unlink()
        (home / name).write_text(text.replace(before, before + line))

    path = instead_of_installed(folder, folder / "start")

    def run(*words: object, cwd: Path = folder) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(folder / "cache")}
        command = [sys.executable, *map(str, words)]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)

    return run
