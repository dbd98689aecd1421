"""Prepared: reference tests against the operator, and what it must not remember."""

import copy
import pickle

import pytest
import torch

from polybit.core.runtime import PolybitError
from polybit.kernels import cpu, ops
from polybit.kernels.prepared import Holder, Prepared
from tests.kernels.test_ops import KINDS, random_input, random_planes


@pytest.mark.skipif(not cpu.instruction_sets(), reason="needs the compiled kernels")
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_operator(kind):
    """Every width, mode and type of input, with ratios that differ from width to width."""
    p = random_planes(37, 200, group_size=32, **KINDS[kind])
    prepared, bias = Prepared(p), random_input(37, seed=3)
    assert prepared.layer is not None
    for width in range(1, 9):
        for activations in ops.MODES:
            for dtype in ops.FLOATS:
                x = random_input(2, 3, 200, dtype=dtype)
                expected = ops.linear(x, p, width, bias, activations=activations)
                assert torch.equal(prepared.linear(x, width, bias, activations), expected)


def test_what_the_kernels_cannot_do_goes_to_the_operator():
    p = random_planes(20, 96, group_size=16)
    assert Prepared(p).layer is None
    x = random_input(2, 96)
    assert torch.equal(Prepared(p).linear(x, 4, None, "int8"), ops.linear(x, p, 4, activations="int8"))
    fit = Prepared(random_planes(20, 96))
    for arguments in ((x[:, :95], 4), (x.double(), 4), (x, 9), (x, 0), (x, 4, torch.zeros(19)), (x[0, 0], 4)):
        with pytest.raises(PolybitError):
            fit.linear(*arguments)


def test_recorded_calls_pass_the_dispatcher():
    """Whoever counts or records operators sees this one."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    with Record():
        Prepared(random_planes(20, 96)).linear(random_input(2, 96), 4)
    assert "polybit.linear.default" in seen


def test_holder_notices_tensors_that_moved():
    holder, p, other = Holder(), random_planes(20, 96), random_planes(20, 96, seed=9)
    x = random_input(2, 96)
    first = holder.get([p.planes, None], lambda: p)
    assert holder.get([p.planes, None], lambda: p) is first
    second = holder.get([other.planes, None], lambda: other)
    assert torch.equal(second.linear(x, 4), ops.linear(x, other, 4, activations="int16"))
    for copied in (copy.deepcopy(holder), pickle.loads(pickle.dumps(holder))):
        assert copied.prepared is None


@pytest.mark.parametrize("mode", ["float", "int8", "int16"])
def test_a_gradient_goes_through_the_exact_product(mode):
    p = random_planes(48, 64)
    x = random_input(3, 64).requires_grad_()
    y = Prepared(p).linear(x, 5, None, mode)
    y.square().sum().backward()
    weight = ops.decode(p, 5)
    expected = x.detach() @ weight.T
    assert torch.allclose(y.detach(), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(x.grad, 2 * expected @ weight, rtol=1e-3, atol=1e-3)
