"""The search on a GPU: the twins' codes there, quantizers as good as in main memory, and the memory they take."""

import pytest
import torch

from polybit.core.affine import Grid
from polybit.core.records import LayerStats
from polybit.kernels import search
from polybit.quant.gptq import gptq
from polybit.quant.nested import WIDTHS, nested
from polybit.quant.problem import layer_loss
from tests.quant.inputs import layer
from tests.quant.test_compiled import GRIDS, KINDS, check_nested, check_walks

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def moved(weight_OI, seen):
    """The same on the GPU."""
    return weight_OI.to(DEVICE), LayerStats(seen.hessian_II.to(DEVICE), seen.absmean_I.to(DEVICE), seen.tokens)


def test_it_is_taken_there():
    assert search.way(torch.zeros(1, device=DEVICE)) == "triton"


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("rows", "columns", "grid"), GRIDS)
def test_scales_compensation_and_descent(dtype, rows, columns, grid):
    check_walks(0, dtype, rows, columns, grid, DEVICE)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("widths", [WIDTHS, (8, 7, 6, 5, 4, 3, 2), (4, 3, 2), (8, 2), (8, 7), (3, 2)])
@pytest.mark.parametrize(("rows", "columns", "size", "zero"), [(37, 100, 32, "group"), (3, 150, 0, "level")])
def test_nested_codes(dtype, widths, rows, columns, size, zero):
    check_nested(0, dtype, widths, rows, columns, size, zero, DEVICE)


def losses(made, weight_OI, seen):
    """Layer loss at every width, float64 in main memory."""
    return [layer_loss(weight_OI, made, seen, b) for b in (made.bits, *made.ratios)]


@pytest.mark.parametrize("size", [32, 64, 128, 0])
@pytest.mark.parametrize("make", [gptq, nested])
def test_as_good_as_in_main_memory(make, size):
    weight_OI, seen = layer(300, 1024)
    grid = Grid(3 if make is gptq else 8, size, "group")
    here, there = make(weight_OI, seen, grid), make(*moved(weight_OI, seen), grid)
    there = type(there)(
        there.codes_OI.cpu(), there.scale_OG.cpu(), there.zero.cpu(), there.bits, there.group_size,
        {b: ratio.cpu() for b, ratio in there.ratios.items()},
    )  # fmt: skip
    for mine, theirs in zip(losses(there, weight_OI, seen), losses(here, weight_OI, seen), strict=True):
        assert mine <= 1.02 * theirs


def test_rows_in_parts_are_the_same(monkeypatch):
    from polybit.kernels import device_search

    given = moved(*layer(300, 512))
    whole = nested(*given, Grid(8, 64, "group"))
    monkeypatch.setattr(device_search, "LARGEST", 6 * 512 * 100)
    assert float((nested(*given, Grid(8, 64, "group")).codes_OI == whole.codes_OI).float().mean()) > 0.7


def test_memory_of_a_large_layer():
    """Nested codes of 4096 x 4096 take less than five times the gradients of six widths."""
    weight_OI = torch.randn(4096, 4096, device=DEVICE)
    seen = LayerStats(torch.eye(4096, device=DEVICE), torch.ones(4096, device=DEVICE), 1)
    torch.cuda.reset_peak_memory_stats()
    nested(weight_OI, seen, Grid(8, 64, "group"), rounds=1)
    assert torch.cuda.max_memory_allocated() < 5 * 6 * 4 * weight_OI.numel()
