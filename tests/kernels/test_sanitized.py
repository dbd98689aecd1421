"""The C++ under the address and undefined-behaviour sanitizers: random shapes in buffers of exactly the right size.

On x86 the Arm kernels run too, over plain C++ in place of the Arm intrinsics.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from polybit.kernels import cpu

SOURCES = Path(cpu.__file__).parent / "csrc"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"]
EMULATED = ["-U__linux__", "-D__aarch64__", "-D__ARM_FEATURE_DOTPROD", f"-I{Path(__file__).parent / 'neon_on_x86'}"]
OBJECTS = {  # object -> (source, flags)
    "linear": ("linear.cpp", []),
    "stored": ("stored.cpp", []),
    "portable": ("portable.cpp", []),
    "neon": ("neon.cpp", EMULATED),
    "avx2": ("avx2.cpp", AVX2),
    # in its AVX-512 form, which more processors can run
    "avxvnni": ("avx2.cpp", [*AVX2, "-mavx512vl", "-mavx512vnni", "-DPOLYBIT_VNNI"]),
    "avx512": ("avx512.cpp", AVX512),
}

SEARCH = {
    "search_portable": ("search_portable.cpp", []),
    "search_avx2": ("search_avx2.cpp", AVX2),
    "search_avx512": ("search_avx512.cpp", AVX512),
}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize(("fuzz", "parts"), [("fuzz.cpp", OBJECTS), ("fuzz_search.cpp", SEARCH)])
def test_no_byte_is_touched_that_is_not_ours(tmp_path, fuzz, parts):
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    common = ["-std=c++17", "-O1", "-g", "-w", "-ffp-contract=off", f"-I{SOURCES}", *checks]
    machine = subprocess.run(["g++", "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    objects = []
    for name, (source, flags) in parts.items():
        objects.append(str(tmp_path / f"{name}.o"))
        if "x86" not in machine:
            flags = [f for f in flags if f == "-DPOLYBIT_VNNI"]
        subprocess.run(["g++", *common, *flags, "-c", str(SOURCES / source), "-o", objects[-1]], check=True)
    program = tmp_path / "fuzz"
    subprocess.run(["g++", *common, str(Path(__file__).parent / fuzz), *objects, "-o", str(program)], check=True)
    found = subprocess.run([str(program), "150"], capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "0 wrong" in found.stdout


ARM, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
ON_ARM = {  # as CMakeLists.txt builds them there; the x86 sets are empty
    "neon": ("neon.cpp", ["-march=armv8.2-a+dotprod"]),
    "avxvnni": ("avx2.cpp", ["-DPOLYBIT_VNNI"]),
    **{name: (f"{name}.cpp", []) for name in ("linear", "stored", "portable", "avx2", "avx512")},
}


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which(ARM) and shutil.which(EMULATOR)), reason=f"needs {ARM} and {EMULATOR}")
@pytest.mark.parametrize(
    ("fuzz", "parts"),
    [("fuzz.cpp", ON_ARM), ("fuzz_search.cpp", {name: (source, []) for name, (source, _) in SEARCH.items()})],
)
def test_arm_kernels_give_the_literal_sums(tmp_path, fuzz, parts):
    """Compiled for 64-bit Arm as a wheel is, the true intrinsics, run by an emulator of the processor."""
    common = ["-std=c++17", "-O2", "-w", "-ffp-contract=off", "-static", f"-I{SOURCES}"]
    objects = [str(tmp_path / f"{name}.o") for name in parts]
    for made, (source, flags) in zip(objects, parts.values(), strict=True):
        subprocess.run([ARM, *common, *flags, "-c", str(SOURCES / source), "-o", made], check=True)
    program = tmp_path / "fuzz"
    subprocess.run([ARM, *common, str(Path(__file__).parent / fuzz), *objects, "-o", str(program)], check=True)
    found = subprocess.run([EMULATOR, str(program), "150"], capture_output=True, text=True, timeout=600)
    assert found.returncode == 0 and "0 wrong" in found.stdout, found.stdout + found.stderr
