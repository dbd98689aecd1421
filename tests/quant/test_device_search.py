"""The search for a GPU: interpreted, the twins' codes; compiled without a GPU, nothing spilled."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from polybit.core.affine import Grid
from polybit.kernels import search
from polybit.quant.gptq import gptq
from polybit.quant.nested import WIDTHS, nested
from tests.quant.inputs import layer
from tests.quant.test_compiled import GRIDS, KINDS, RAGGED, check_nested, check_walks

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture
def device_search(monkeypatch):
    """The search, with blocks, stretches and parts of rows so small that a small weight has several of each."""
    from polybit.kernels import device_search

    monkeypatch.setattr(device_search, "BLOCK", 8)
    monkeypatch.setattr(device_search, "STRETCH", 16)
    monkeypatch.setattr(device_search, "LARGEST", 20 * 2)
    return device_search


def test_several_blocks_stretches_and_parts_of_rows(device_search):
    check_walks(search.TRITON, torch.float64, 3, 20, Grid(3, 16, "group"))


def test_nested_codes(monkeypatch):
    monkeypatch.setattr("polybit.quant.slices.SHRINKS", (0.8, 1.0))
    check_nested(search.TRITON, torch.float64, (4, 2), 3, 20, 0, "group")


@pytest.mark.slow
def test_more_blocks_and_programs_that_are_not_full(device_search, monkeypatch):
    monkeypatch.setattr(device_search, "ROW_TILE", 4)
    check_walks(search.TRITON, torch.float32, 7, 40, Grid(3, 32, "group"))
    check_walks(search.TRITON, torch.float64, 7, 40, Grid(4, 16, "level").with_widths(RAGGED[:3]))


def test_who_searches(monkeypatch):
    here, half = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.float16)
    there = type("OnGPU", (), {"is_cuda": True, "is_cpu": False, "dtype": torch.float32})()
    assert search.way(there) == "triton" and search.way(half) == "twin"
    assert search.way(here) == ("compiled" if search.instruction_sets() else "twin")
    for asked, found in ((None, "twin"), (search.TRITON, "triton")):
        with search.using(asked):
            assert search.way(here) == search.way(there) == found
    monkeypatch.setitem(sys.modules, "polybit.kernels.device_search", None)
    monkeypatch.delattr("polybit.kernels.device_search", raising=False)
    search.device_kernels.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"without triton.*pip install"):
            assert search.way(there) == "twin"
    finally:
        search.device_kernels.cache_clear()


def test_products_are_exact_whatever_torch_was_told():
    from polybit.kernels.device_search import at_work

    torch.set_float32_matmul_precision("medium")
    try:
        with at_work(torch.zeros(1)):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("rows", "columns", "grid"), GRIDS)
def test_scales_compensation_and_descent(dtype, rows, columns, grid):
    check_walks(search.TRITON, dtype, min(rows, 9), columns, grid)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("widths", [WIDTHS, (8, 7, 6, 5, 4, 3, 2), (8, 2), (8, 7)])
@pytest.mark.parametrize(("size", "zero"), [(32, "group"), (0, "level")])
def test_all_nested_codes(dtype, widths, size, zero):
    check_nested(search.TRITON, dtype, widths, 5, 40, size, zero)


@pytest.mark.slow
@pytest.mark.parametrize("make", [gptq, nested])
def test_whole_quantizers(make):
    weight_OI, seen = layer(6, 64)
    grid, found = Grid(3 if make is gptq else 8, 32, "group"), []
    for way in (None, search.TRITON):
        with search.using(way):
            found.append(make(weight_OI, seen, grid))
    slow, fast = found
    assert torch.equal(slow.codes_OI, fast.codes_OI) and torch.equal(slow.scale_OG, fast.scale_OG)


def compiles(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_search.py")), *map(str, arguments)]
    subprocess.run(command, check=True, env=environment, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("bits", [32, 64])
def test_compiles_without_a_gpu(arch, bits):
    compiles(arch, bits)


def test_one_compiles_without_a_gpu():
    compiles(90, 32, "one")
