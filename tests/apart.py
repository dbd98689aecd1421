"""Another tree of the package in the place of the installed one, for a process of its own."""

from pathlib import Path

# An editable install finds the package by a hook that comes before every path; a process that shall take another tree
# must let it go first. Python runs this file at its start, from the front of its path.
START = """import sys

sys.meta_path[:] = [f for f in sys.meta_path if "editable_skbc_polybit" not in type(f).__module__]
"""


def instead_of_installed(tree: Path, folder: Path) -> str:
    """The PYTHONPATH with which a process imports polybit from `tree`; writes a file it needs into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(START)
    return f"{folder}:{tree}"
