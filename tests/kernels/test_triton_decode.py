"""Decoding for a GPU: interpreted, the slow twin's bits; products by it; compiled without a GPU, nothing fused."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from polybit.kernels import ops, reference
from tests.kernels.test_ops import KINDS, random_input, random_planes, relative

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture(scope="module")
def kernel():
    from polybit.kernels import triton_decode  # interpreted: see tests/conftest.py

    return triton_decode


@pytest.mark.parametrize(("kind", "group_size"), list(zip(KINDS, (0, 32, 128, 64), strict=True)))
def test_interpreted_gives_the_very_bits_of_the_slow_twin(kernel, kind, group_size):
    p = random_planes(20, 200, 8, group_size, **KINDS[kind])
    for width in range(1, 9):
        assert torch.equal(kernel.decode(p, width), reference.decode(p, width)), width


def test_interpreted_fewer_stored_planes_and_several_programs(kernel):
    p = random_planes(33, 600, 5, 32, asymmetric=True, ratios=range(1, 5))
    for width in (2, 5):
        assert torch.equal(kernel.decode(p, width), reference.decode(p, width))


def test_interpreted_some_rows_of_another_float_type(kernel):
    p = random_planes(40, 96)
    expected = reference.decode(p, 4)
    assert torch.equal(kernel.decode(p, 4, torch.float16), expected.half())
    assert torch.equal(kernel.decode(p, 4, torch.float16, 16, 24), expected[16:].half())
    cut = kernel.decode(p, 4, torch.bfloat16).float()  # triton's interpreter cuts bfloat16 off instead of rounding
    assert torch.allclose(cut, expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("dtype", ops.FLOATS)
def test_products_by_blocks_of_rows(kernel, monkeypatch, dtype):
    p, x, bias = random_planes(40, 96), random_input(3, 6, 96, dtype=dtype), random_input(40, seed=2)
    exact = reference.linear(x.float(), p, 4, bias)
    for largest in (kernel.LARGEST, 16 * 96 * dtype.itemsize, 1):
        monkeypatch.setattr(kernel, "LARGEST", largest)
        y = kernel.linear(x, p, 4, bias, dtype)
        assert y.dtype == dtype and y.shape == (3, 6, 40)
        assert relative(y, exact) <= 2 * torch.finfo(dtype).eps


def test_the_operator_takes_it_for_many_tokens_and_for_floats(kernel, monkeypatch):
    """What a GPU's dispatch runs, here on main memory."""
    seen = []
    monkeypatch.setattr(kernel, "linear", lambda *a: seen.append((len(a[0]), a[4])) or reference.linear(*a[:4]))
    p = random_planes(20, 96)
    for tokens, mode in ((1, 8), (12, 16), (13, 8), (40, 16), (1, 0)):
        x = random_input(tokens, 96, dtype=torch.bfloat16)
        ops.on_gpu(x, None, mode, [4], *p.apart(4))
    assert seen == [(13, torch.bfloat16), (40, torch.bfloat16), (1, torch.float32)]


def test_the_operator_takes_some_rows_of_a_weight(kernel):
    """Experts: planes cut by rows are apart in memory."""
    p, x = random_planes(48, 96), random_input(13, 96)
    cut = replace(p, planes=p.planes[:, 1:2], scale=p.scale[1:2], shape=(16, 96))
    for tokens in (1, 13):
        y = ops.on_gpu(x[:tokens], None, 16, [4], *cut.apart(4))
        assert relative(y, reference.linear(x[:tokens], p, 4)[:, 16:32]) <= 1e-4


COMPILE = """
import subprocess, sys, tempfile, triton
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from polybit.kernels.triton_decode import BLOCKS, WARPS, decode_rows
arch, width = map(int, sys.argv[1:3])
signature = dict(planes="*u32", scale="*fp16", zero="*u8", ratio="*u8", column_scale="*fp16", weight="*" + sys.argv[3],
                 stride="i32", rows="i32", columns="i32", blocks="i32", groups="i32", first_block="i32",
                 gain="fp32", fixed_zero="fp32", low="fp32", high="fp32")
fixed = dict(STORED=8, WIDTH=width, GROUP_BLOCKS=2, HAS_ZERO=True, HAS_RATIO=True, HAS_COLUMN_SCALE=True,
             BLOCKS=BLOCKS, INTERPRET=False)
names = decode_rows.arg_names
source = ASTSource(fn=decode_rows, signature=signature | {n: "constexpr" for n in fixed},
                   constexprs={(names.index(n),): v for n, v in fixed.items()},
                   attrs={(names.index(n),): [["tt.divisibility", 16]] for n in ("planes", "weight", "columns")})
options = {"num_warps": WARPS, "enable_fp_fusion": False}
built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
ptx = built.asm["ptx"]
assert "fma" not in ptx and "lop3" in ptx and "st.global.v4" in ptx, "not the twin's arithmetic, or narrow stores"
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(built.asm["cubin"])
    file.flush()
    usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
assert "STACK:0" in usage and "LOCAL:0" in usage, usage
"""


def compiles(arch, width, dtype):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(arch), str(width), dtype]
    subprocess.run(command, check=True, env=environment, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("width", "dtype"), [(width, "bf16") for width in range(1, 9)] + [(4, "fp32"), (8, "fp32")])
def test_compiles_without_a_gpu(arch, width, dtype):
    compiles(arch, width, dtype)


def test_one_compiles_without_a_gpu():
    compiles(90, 4, "bf16")
