"""Rounding of activations for a GPU: interpreted, the slow twin's bits; compiled, nothing that would change them."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from polybit.kernels.reference import LEVELS, round_activations
from tests.kernels.test_ops import random_input

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def awkward_input(tokens, columns, dtype=torch.float32, seed=1):
    """Random numbers, zeros, sizes from 1e-42 to 1e30, ties at either kind of levels, one NaN and one infinity."""
    x = random_input(tokens, columns, seed=seed)
    least = -42 if dtype == torch.float32 else -36  # triton's interpreter misreads denormals of 16 bits
    x[0] *= 10.0 ** torch.linspace(least, 30, columns)
    if tokens > 1:
        x[1] = torch.arange(columns) % 127 - 63.5  # with 127 in every chunk the inverse is 1: all codes are ties
        x[1, ::32] = 127.0
    if tokens > 2:
        x[2] = torch.arange(columns) * 37 % 32000 - 16000.5
        x[2, ::32] = -127.0 * 256
    if tokens > 3:
        x[3, :40] = 0.0
        x[3, -1] = torch.inf
    if tokens > 4:
        x[4, 0] = torch.nan
    return x.to(dtype)


def check(device, tokens, columns, chunk, dtype, scaled):
    """The kernel's words, scales and sums against its twin's, as bits."""
    from polybit.kernels.triton_round import round_words, slow_round_words

    x = awkward_input(tokens, columns, dtype).to(device)
    column_scale = (random_input(columns).abs() + 0.5).half().to(device) if scaled else None
    for levels in LEVELS.values():
        fast, slow = (rounded(x, column_scale, chunk, levels) for rounded in (round_words, slow_round_words))
        for ours, theirs in zip(fast, slow, strict=True):
            assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
            spoiled = theirs.isnan()
            assert torch.equal(ours.isnan(), spoiled)
            same = ours.view(torch.int32) == theirs.view(torch.int32)
            assert bool((same | spoiled).all()), levels


@pytest.mark.parametrize(("columns", "chunk"), [(200, 64), (32, 32), (300, 128), (1500, 128), (1, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_interpreted_gives_the_very_bits_of_the_slow_twin(columns, chunk, dtype):
    for scaled in (False, True):
        check("cpu", 5, columns, chunk, dtype, scaled)


@pytest.mark.parametrize("levels", LEVELS.values())
def test_the_twin_rounds_as_the_reference_does(levels):
    from polybit.kernels.triton_round import slow_round_words

    x = awkward_input(5, 200)
    words, scale, _ = slow_round_words(x, None, 64, levels)
    digits = words.transpose(-1, -2).contiguous().view(torch.int8).view(5, -1, 224).int()
    codes = digits[:, 0] if levels < 256 else 256 * digits[:, 0] + digits[:, 1]
    decoded = codes.double()[:, :200] * scale.double().repeat_interleave(32, 1)[:, :200]
    assert torch.equal(decoded.nan_to_num(-1), round_activations(x, 64, levels, torch.float64).nan_to_num(-1))


COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from polybit.kernels.triton_round import TILE, WARPS, round_tokens
arch, chunk, levels = map(int, sys.argv[1:])
signature = dict(x="*bf16", column_scale="*fp16", words="*i32", scale="*fp32", sums="*i32", columns="i32",
                 blocks="i32")
fixed = dict(LEVELS=levels, DIGITS=1 if levels < 256 else 2, CHUNK_BLOCKS=chunk // 32, BLOCKS=TILE,
             HAS_COLUMN_SCALE=True)
names = round_tokens.arg_names
source = ASTSource(fn=round_tokens, signature=signature | {n: "constexpr" for n in fixed},
                   constexprs={(names.index(n),): v for n, v in fixed.items()},
                   attrs={(names.index(n),): [["tt.divisibility", 16]] for n in ("x", "words", "scale", "sums")})
options = {"num_warps": WARPS, "enable_fp_fusion": False}
ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]
assert "div.rn.f32" in ptx, "a division that is not exact"
assert "fma" not in ptx and ".ftz" not in ptx and "approx" not in ptx, "arithmetic that is not the twin's"
"""


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("chunk", "levels"), [(32, 127), (64, 32512), (128, 127), (32, 32512)])
def test_compiles_without_a_gpu(arch, chunk, levels):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, *map(str, (arch, chunk, levels))]
    subprocess.run(command, check=True, env=environment, timeout=600)


def test_one_compiles_without_a_gpu():
    test_compiles_without_a_gpu(90, 64, 32512)
