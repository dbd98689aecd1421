"""The GPU kernel: interpreted against the slow twin at every width, and compiled for sm_80 and sm_90 without a GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from polybit.kernels import ops, reference
from polybit.kernels.route import MOST_TOKENS
from tests.kernels.test_ops import KINDS, random_input, random_planes, relative
from tests.kernels.test_triton_round import awkward_input

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture(scope="module")
def kernel():
    from polybit.kernels import triton_gemv  # interpreted: see tests/conftest.py

    return triton_gemv


@pytest.mark.parametrize("arithmetic", ["int8", "int16"])
@pytest.mark.parametrize(("kind", "group_size"), list(zip(KINDS, (0, 32, 128, 64), strict=True)))
def test_interpreted_equals_the_slow_twin(kernel, kind, arithmetic, group_size):
    p = random_planes(20, 200, 8, group_size, **KINDS[kind])
    x, bias = random_input(1, 200), random_input(20, seed=2)
    for width in range(1, 9):
        exact = reference.linear(x.double(), p, width, bias, arithmetic=arithmetic, precision=torch.float64)
        assert relative(kernel.linear(x, p, width, bias, arithmetic), exact) <= 1e-6, width


@pytest.mark.parametrize("tokens", [2, 3, 5])
def test_interpreted_equals_the_slow_twin_for_several_tokens(kernel, tokens):
    p, x = random_planes(20, 1100, **KINDS["everything"]), random_input(tokens, 1100)
    for width in (3, 5):
        exact = reference.linear(x.double(), p, width, arithmetic="int8", precision=torch.float64)
        assert relative(kernel.linear(x, p, width, None, "int8"), exact) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_interpreted_reads_and_writes_16_bit_floats(kernel, dtype):
    """Input, bias and output in their own type: rounded once, at the end."""
    p, x, bias = random_planes(20, 96), random_input(2, 96, dtype=dtype), random_input(20, dtype=dtype, seed=2)
    y = kernel.linear(x, p, 4, bias, "int16")
    exact = reference.linear(x.float(), p, 4, bias.float(), arithmetic="int16")
    assert y.dtype == dtype
    assert torch.allclose(y.float(), exact, rtol=torch.finfo(dtype).eps, atol=2e-6 * float(exact.abs().max()))


@pytest.mark.parametrize("tokens", [1, 2])
def test_interpreted_float16_overflows_to_infinity(kernel, tokens):
    """As every other way does: tests/kernels/test_ops.py."""
    p, x = random_planes(20, 300), random_input(tokens, 300).mul(1e4).half()
    for mode in ("int8", "int16"):
        wide = kernel.linear(x.float(), p, 8, None, mode)
        assert (wide.abs() >= 65520).any() and (wide.abs() < 65520).any()
        assert torch.equal(kernel.linear(x, p, 8, None, mode), wide.half())


def test_interpreted_spoiled_token_spoils_only_itself(kernel):
    p, x = random_planes(20, 200), random_input(2, 200)
    clean = kernel.linear(x, p, 4, None, "int8")
    x[1, 3] = float("nan")
    y = kernel.linear(x, p, 4, None, "int8")
    assert torch.equal(y[0], clean[0]) and y[1].isnan().all()


def test_the_operator_takes_it_for_a_few_tokens(kernel):
    """What a GPU's dispatch runs, here on main memory; odd group sizes and no tokens go to the slow twin."""
    for tokens, group_size in ((1, 64), (MOST_TOKENS, 64), (MOST_TOKENS + 1, 64), (2, 16), (20, 16), (0, 64)):
        p, x = random_planes(20, 96, 8, group_size), random_input(tokens, 96, dtype=torch.bfloat16)
        y = ops.on_gpu(x, None, 8, [4], *p.apart(4))
        rounded = tokens <= MOST_TOKENS or group_size == 16
        expected = reference.linear(x, p, 4, arithmetic="int8" if rounded else "float")
        assert y.shape == (tokens, 20) and y.dtype == torch.bfloat16
        # triton's interpreter cuts the decoded weight off to bfloat16 instead of rounding it
        assert not tokens or relative(y, expected) <= (1 if rounded else 2) * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("mode", ["int8", "int16"])
def test_one_token_rounded_in_the_kernel_is_the_same(kernel, mode):
    for kind in ("plain", "everything"):
        p, x = random_planes(20, 300, 8, 64, **KINDS[kind]), awkward_input(1, 300).clamp(-1e3, 1e3)
        for width in (3, 6):
            y = kernel.linear(x.half(), p, width, None, mode)
            assert y.isfinite().all() and torch.equal(y, kernel.linear(x.half(), p, width, None, mode, fuse=False))
    assert kernel.linear(awkward_input(5, 300)[4:], p, 3, None, mode).isnan().all()


COMPILE = """
import subprocess, sys, tempfile, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from polybit.kernels.triton_gemv import REGISTERS, gemv, tile_of
arch, tokens = map(int, sys.argv[1:])
alone = tokens == 1
signature = dict(x="*bf16" if alone else "*i32", x_scale="*fp16" if alone else "*fp32", x_sum="*i32",
                 planes="*u32", scale="*fp16", zero="*u8", ratio="*u8", bias="*bf16", y="*bf16",
                 tokens="i32", stride="i32", rows="i32", columns="i32", blocks="i32", groups="i32",
                 gain="fp32", fixed_zero="fp32", low="fp32", high="fp32")
at_once, wide, warps = tile_of(128, tokens)
for width in (2, 4, 8):
    for digits in (1, 2):
        fixed = dict(STORED=8, WIDTH=width, GROUP_BLOCKS=2, CHUNK_BLOCKS=2, DIGITS=digits, HAS_ZERO=True,
                     HAS_RATIO=True, HAS_BIAS=True, HAS_COLUMN_SCALE=alone, ROUND=alone, TOKENS=at_once,
                     BLOCKS=wide, INTERPRET=False)
        names = gemv.arg_names
        source = ASTSource(fn=gemv, signature=signature | {n: "constexpr" for n in fixed},
                           constexprs={(names.index(n),): v for n, v in fixed.items()},
                           attrs={(names.index(n),): [["tt.divisibility", 16]] for n in ("x", "planes", "scale")})
        options = {"num_warps": warps, "enable_fp_fusion": False, "maxnreg": REGISTERS if alone else None}
        built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        ptx = built.asm["ptx"]
        assert "dp4a" in ptx and "lop3" in ptx
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(built.asm["cubin"])
            file.flush()
            usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        spilled = int(usage.split("STACK:")[1].split()[0])
        assert spilled <= (80 if alone else 0) and "LOCAL:0" in usage, usage
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_compiles_without_a_gpu(arch, tokens):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", COMPILE, str(arch), str(tokens)], check=True, env=environment, timeout=600)
