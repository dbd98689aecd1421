"""What the compiled files of a wheel ask of the machine they are loaded on: processor, glibc, libraries.

    python packaging/symbols.py wheels/*.whl --glibc 2.28

Reads the tables a loader reads, with pyelftools. Ends with 1 where a file is of another processor than the wheel's
name says, or asks for a newer glibc, or for a library that neither lies in the wheel nor on every Linux nor comes with
torch.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile

MACHINES = {"x86_64": "EM_X86_64", "aarch64": "EM_AARCH64"}
EVERYWHERE = {  # libgomp: torch brings the one that is loaded by then
    "libgomp.so.1", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6", "libpthread.so.0",
    "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1",
}  # fmt: skip


def asked(data: bytes) -> dict[str, Any]:
    """Of one shared object: its machine, the libraries it needs, and the newest glibc among the symbols it asks for."""
    elf = ELFFile(io.BytesIO(data))
    needed = [tag.needed for tag in elf.get_section_by_name(".dynamic").iter_tags() if tag.entry.d_tag == "DT_NEEDED"]
    versions = [
        number(symbol.name)
        for _, wanted in elf.get_section_by_name(".gnu.version_r").iter_versions()
        for symbol in wanted
        if symbol.name.startswith("GLIBC_")
    ]
    return {"machine": elf.header.e_machine, "needed": needed, "glibc": max(versions, default=())}


def number(version: str) -> tuple[int, ...]:
    """(2, 16) of GLIBC_2.16 or 2.16."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def faults(wheel: Path, newest: tuple[int, ...]) -> list[str]:
    """A sentence for everything that does not hold; prints what each file asks for."""
    found = []
    machine = next(MACHINES[name] for name in MACHINES if wheel.stem.endswith(name))
    with zipfile.ZipFile(wheel) as files:
        inside = {name: files.read(name) for name in files.namelist() if name.endswith(".so")}
    if not inside:
        found.append(f"{wheel.name}: holds nothing that is compiled")
    own = {Path(name).name for name in inside}
    for name, data in inside.items():
        of = asked(data)
        print(f"{name}: {of['machine']}, glibc {'.'.join(map(str, of['glibc']))}, {', '.join(of['needed'])}")
        if of["machine"] != machine:
            found.append(f"{name}: is for {of['machine']}, the wheel's name says {machine}")
        if of["glibc"] > newest:
            found.append(f"{name}: asks for glibc {'.'.join(map(str, of['glibc']))}")
        if strange := set(of["needed"]) - EVERYWHERE - own:
            found.append(f"{name}: needs {', '.join(sorted(strange))}")
    return found


def main() -> None:
    """Every wheel named; what does not hold goes to stderr."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument("--glibc", default="2.28", help="the oldest that a wheel must load on")
    options = parser.parse_args()
    found = [fault for wheel in options.wheels for fault in faults(wheel, number(options.glibc))]
    for fault in found:
        print(fault, file=sys.stderr)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
