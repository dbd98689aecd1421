"""Compiles the kernels of the search for a GPU that is not there: python compile_search.py ARCH BITS, prints registers
and spills of each. Run by test_device_search.py in a process whose triton is not interpreted."""

import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from polybit.kernels.triton_fit import fit_rows
from polybit.kernels.triton_scales import clip_groups, slice_groups
from polybit.kernels.triton_walk import compensate_block, descend_block

NESTED = {"COUNT": 6, "WIDTHS": 8}
TREE = {"PARENTS": 64, "CHILDREN": 4}
ONE = {"COUNT": 1, "WIDTHS": 1}
BARE = {"PARENTS": 1, "CHILDREN": 8}
KERNELS = [
    (compensate_block, {**NESTED, **TREE, "ONE_GROUP": True, "ROWS": 2, "COLUMNS": 64}, 1),
    (compensate_block, {**ONE, **BARE, "ONE_GROUP": False, "ROWS": 8, "COLUMNS": 64}, 1),
    (descend_block, {**NESTED, **TREE, "HELD": False, "ROWS": 2, "COLUMNS": 64}, 1),
    (descend_block, {**NESTED, **TREE, "HELD": True, "ROWS": 2, "COLUMNS": 32}, 1),
    (descend_block, {**ONE, **BARE, "HELD": False, "ROWS": 8, "COLUMNS": 64}, 1),
    (fit_rows, {**NESTED, "ZERO": True, "TABLES": True, "ROWS": 2, "COLUMNS": 16}, 1),
    (fit_rows, {**ONE, "ZERO": True, "TABLES": False, "ROWS": 8, "COLUMNS": 16}, 1),
    (clip_groups, {"KIND": 2, "REFINE": 2, "ROWS": 8, "COLUMNS": 64}, 1),
    (clip_groups, {"KIND": 0, "REFINE": 2, "ROWS": 1, "COLUMNS": 4096}, 8),
    (slice_groups, {**NESTED, "FREE": True, "ROWS": 4, "COLUMNS": 64}, 1),
]
BYTES = {"codes": "*u8"}
WHOLE = {"group_of": "*i32", "bits": "*i32", "has_tables": "*i32"}
NUMBERS = ("gain", "fixed_zero", "top")
COUNTS = (
    "rows", "columns", "first", "count", "group", "groups", "plane", "apart", "slope_apart", "total_apart",
    "moved_apart", "cell", "size", "points", "shrink_count", "tilt_count",
)  # fmt: skip


def type_of(name: str, kind: str) -> str:
    """How triton is told the type of an argument."""
    if name in NUMBERS:
        return "fp32"
    return "i32" if name in COUNTS else (BYTES | WHOLE).get(name, f"*{kind}")


def built(kernel, fixed, warps, arch, kind):
    """What cuobjdump says of a compiled kernel."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in fixed else type_of(n, kind) for n in names}
    constants = {(names.index(n),): v for n, v in fixed.items()}
    pointers = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n] == f"*{kind}"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=pointers)
    made = triton.compile(
        source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    architecture, bits = map(int, sys.argv[1:3])
    for kernel, fixed, warps in KERNELS if len(sys.argv) < 4 else KERNELS[2:3]:
        usage = built(kernel, fixed, warps, architecture, f"fp{bits}")
        registers, stack = (int(usage.split(word)[1].split()[0]) for word in ("REG:", "STACK:"))
        print(kernel.fn.__name__, fixed, f"registers {registers}, spilled {stack}", flush=True)
        assert bits == 64 or stack <= 64, usage
