"""Launches worked out once: repeated with the arguments that triton was given, and left to `ops.linear` where unfit."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from polybit.kernels import reference
from tests.kernels.test_ops import KINDS, random_input, random_planes, relative

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture
def repeated(monkeypatch):
    """Calls past triton, in a layer on main memory whose first calls are interpreted."""
    from polybit.kernels import triton_layer

    calls, real = [], triton_layer.launch

    def launch(*given):
        _, grid, arguments = real(*given)
        built = SimpleNamespace(run=lambda *a: calls.append(a), function=7, packed_metadata=())
        return built, grid, arguments

    monkeypatch.setattr(triton_layer, "launch", launch)
    for name, value in (("_cuda_getDevice", -1), ("_cuda_getCurrentRawStream", 5)):  # -1 is main memory's number
        monkeypatch.setattr(torch._C, name, lambda *a, value=value: value, raising=False)
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_call_has_the_first_one_s_arguments(repeated, kind):
    from polybit.kernels.triton_gemv import gemv
    from polybit.kernels.triton_layer import CONSTANTS, LaunchedLayer

    p, x, bias = random_planes(40, 300, **KINDS[kind]), random_input(1, 1, 300), random_input(40, seed=2)
    layer = LaunchedLayer(p)
    y = layer.linear(x, 4, bias, "int16")
    assert relative(y, reference.linear(x, p, 4, bias, arithmetic="int16")) <= 1e-5 and not repeated
    again = layer.linear(other := x.clone(), 4, bias, "int16")
    ((*start, metadata, a, b, c), given) = repeated[0][:9], dict(zip(gemv.arg_names, repeated[0][9:], strict=True))
    assert start == [3, 1, 1, 5, 7] and (metadata, a, b, c) == ((), None, None, None)
    assert again.shape == (1, 1, 40) and given["y"] == again.data_ptr() and given["x"] == other.data_ptr()
    assert given["bias"] == bias.data_ptr() and given["planes"] == p.planes.data_ptr()
    assert (given["rows"], given["columns"], given["WIDTH"], given["DIGITS"]) == (40, 300, 4, 2)
    assert gemv.arg_names[CONSTANTS] == "STORED" and all(type(v) in (int, float, bool) for v in given.values())
    assert layer.linear(x.half(), 4, bias, "int16") is not None and len(repeated) == 1  # another build


def test_what_it_leaves_to_the_operator(repeated):
    from polybit.kernels.triton_layer import LaunchedLayer

    p, x = random_planes(20, 96), random_input(1, 96)
    layer = LaunchedLayer(p)
    assert layer.linear(x.double(), 4, None, "int8") is None
    assert layer.linear(x, 9, None, "int8") is None and layer.linear(x, (4, 4), None, "int8") is None
    assert layer.linear(x, 4, None, "float") is None
    assert layer.linear(random_input(2, 96), 4, None, "int8") is None
    assert layer.linear(random_input(96, 1), 4, None, "int8") is None
    assert layer.linear(random_input(97)[1:], 4, None, "int8") is None  # not aligned
    assert layer.linear(x.clone().requires_grad_(), 4, None, "int8") is None
    assert layer.linear(x, 4, random_input(21), "int8") is None
