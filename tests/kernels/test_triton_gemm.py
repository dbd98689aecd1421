"""The GPU kernel for many tokens: interpreted against the slow twin at every width, and compiled without a GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from polybit.kernels import ops, reference
from tests.kernels.test_ops import KINDS, random_input, random_planes, relative

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture(scope="module")
def kernel():
    from polybit.kernels import triton_gemm  # interpreted: see tests/conftest.py

    return triton_gemm


def check(kernel, kind, width, mode, group_size, tokens):
    p = random_planes(84, 200, 8, group_size, **KINDS[kind])
    x, bias = random_input(tokens, 200), random_input(84, seed=2)
    exact = reference.linear(x.double(), p, width, bias, activations=mode, precision=torch.float64)
    assert relative(kernel.linear(x, p, width, bias, mode), exact) <= 1e-6


@pytest.mark.parametrize("width", range(1, 9))
def test_interpreted_equals_the_slow_twin_at_every_width(kernel, width):
    check(kernel, "zero", width, "int16", 64, 18)


@pytest.mark.parametrize("mode", ["int8", "int16"])
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted_equals_the_slow_twin_with_every_kind_of_weight(kernel, kind, mode):
    check(kernel, kind, 5, mode, 32, 33)


@pytest.mark.parametrize("group_size", [0, 32, 64, 128, 256])
def test_interpreted_equals_the_slow_twin_with_every_group_size(kernel, group_size):
    check(kernel, "zero", 3, "int8", group_size, 130)


def test_interpreted_spoiled_token_spoils_only_itself(kernel):
    p, x = random_planes(20, 96), random_input(20, 96)
    clean = kernel.linear(x, p, 4, None, "int8")
    x[1, 3] = float("nan")
    y = kernel.linear(x, p, 4, None, "int8")
    assert y[1].isnan().all() and torch.equal(y[2:], clean[2:]) and torch.equal(y[0], clean[0])


def test_the_operator_takes_it_for_many_tokens(kernel, monkeypatch):
    """What a GPU's dispatch runs, here on main memory."""
    seen = []
    monkeypatch.setattr(kernel, "linear", lambda *a: seen.append(a[0].shape) or reference.linear(*a[:4]))
    for tokens in (1, 16, 17, 40):
        p, x = random_planes(20, 96), random_input(tokens, 96)
        ops.linear_on_gpu(x, p.planes, p.scale, None, None, None, None, (p.gain, p.zero, 1.0, 1.0), 20, 64, 4, 8)
    assert seen == [(17, 96), (40, 96)]


COMPILE = """
import subprocess, sys, tempfile, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from polybit.kernels.triton_gemm import TILES, gemm
arch, width, digits, tokens = map(int, sys.argv[1:])
signature = dict(x="*i8", x_scale="*fp32", x_sum="*i32", planes="*u32", scale="*fp16", zero="*u8", ratio="*u8",
                 bias="*bf16", y="*bf16", tokens="i32", stride="i32", rows="i32", row_blocks="i32", blocks="i32",
                 groups="i32", chunks="i32", gain="fp32", fixed_zero="fp32", low="fp32", high="fp32")
wide, warps = TILES[tokens]
fixed = dict(STORED=8, WIDTH=width, CHUNK_BLOCKS=2, GROUP_BLOCKS=2, DIGITS=digits, HAS_ZERO=True, HAS_RATIO=True,
             HAS_BIAS=True, TOKENS=tokens, WIDE=wide, INTERPRET=False)
names = [*signature, *fixed]
source = ASTSource(fn=gemm, signature=signature | {n: "constexpr" for n in fixed},
                   constexprs={(names.index(n),): v for n, v in fixed.items()},
                   attrs={(names.index(n),): [["tt.divisibility", 16]] for n in ("x", "planes", "scale")})
built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
ptx = built.asm["ptx"]
assert ("wgmma" if arch == 90 and tokens >= 64 else "mma.sync") in ptx and "s8.s8" in ptx, "no tensor cores"
assert built.metadata.shared <= 96 << 10, built.metadata.shared
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(built.asm["cubin"])
    file.flush()
    usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
print(usage, built.metadata.shared)
assert "STACK:0" in usage and "LOCAL:0" in usage, usage
"""
CASES = [(width, 1, 128) for width in range(1, 9)] + [(width, 2, tokens) for width in (2, 4, 8) for tokens in (32, 64)]


def compiles(arch, width, digits, tokens):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, *map(str, (arch, width, digits, tokens))]
    return subprocess.run(command, check=True, env=environment, timeout=600, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("width", "digits", "tokens"), CASES)
def test_compiles_without_a_gpu(arch, width, digits, tokens):
    compiles(arch, width, digits, tokens)


def test_one_compiles_without_a_gpu():
    compiles(90, 4, 2, 128)
