"""Prepared: reference tests against the operator, and what it must not remember."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch

from polybit.core.planes import pack
from polybit.core.runtime import PolybitError
from polybit.kernels import cpu, ops, reference
from polybit.kernels.adapter import Adapter, pack_factors
from polybit.kernels.prepared import Bundle, Holder, Prepared
from tests.kernels.test_mixed import ragged_weight
from tests.kernels.test_ops import ISAS, KINDS, random_input, random_planes, relative


@pytest.mark.skipif(not cpu.instruction_sets(), reason="needs the compiled kernels")
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_operator(kind):
    """Every width, mode and type of input, with ratios that differ from width to width."""
    p = random_planes(37, 200, group_size=32, **KINDS[kind])
    prepared, bias = Prepared(p), random_input(37, seed=3)
    assert prepared.layer is not None
    for width in range(1, 9):
        for arithmetic in ops.MODES:
            for dtype in ops.FLOATS:
                x = random_input(2, 3, 200, dtype=dtype)
                expected = ops.linear(x, p, width, bias, arithmetic=arithmetic)
                assert torch.equal(prepared.linear(x, width, bias, arithmetic), expected)


def random_adapter(rows, columns, rank=3, seed=5):
    return Adapter(random_input(rank, columns, seed=seed) * 1e-3, random_input(rows, rank, seed=seed + 1) * 30, 0.5)


@pytest.mark.parametrize("isa, name", ISAS)
def test_adapter_is_added_in_the_call(isa, name):
    """Against the same product in float64; odd shapes, every type of input, rounded activations, a column scale."""
    p = random_planes(37, 200, group_size=32, **KINDS["everything"])
    adapter, prepared, bias = random_adapter(37, 200), Prepared(p, isa), random_input(37, seed=3)
    down, up, gain = pack_factors(adapter.down_RI, adapter.up_OR)
    exact_down, exact_up = down[:, :200].double(), up.transpose(1, 2).reshape(-1, 3)[:37].double()
    for tokens in (1, 3, 20):
        for dtype in ops.FLOATS:
            x = random_input(tokens, 200, dtype=dtype)
            for arithmetic in ("int8", "int16"):
                plain = reference.linear(x.double(), p, 4, bias, arithmetic=arithmetic, precision=torch.float64)
                added = x.double() @ exact_down.T @ exact_up.T * (adapter.scale * gain)
                y = prepared.linear(x, 4, bias, arithmetic, adapter)
                assert added.abs().max() > 0.1
                close = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype]
                assert relative(y, plain + added) <= close, (name, tokens, dtype, arithmetic)
    assert relative(adapter.product(x.float()), added) < 1e-3


def test_adapter_where_the_kernels_do_not_serve():
    p, x = random_planes(20, 96, group_size=16), random_input(2, 96)
    adapter = random_adapter(20, 96)
    for arithmetic in ops.MODES:
        plain = ops.linear(x, p, 4, arithmetic=arithmetic)
        y = Prepared(p).linear(x, 4, None, arithmetic, adapter)
        assert torch.allclose(y, plain + adapter.product(x), atol=1e-5)
    fit = Prepared(random_planes(20, 96))
    with pytest.raises(RuntimeError):
        fit.linear(x, 4, None, "int8", random_adapter(21, 96))


def test_adapter_keeps_its_factors():
    """Rounded to 16 bits whatever their size, the same after a copy, anew when an optimizer moves them."""
    down, up, x = random_input(4, 96) * 1e-6, random_input(20, 4) * 1e3, random_input(5, 96)
    adapter, prepared = Adapter(down, up, 0.25), Prepared(random_planes(20, 96))
    assert torch.allclose(adapter.product(x), x @ down.T @ up.T * 0.25)
    for _ in range(2):
        added = prepared.linear(x, 4, None, "int16", adapter) - prepared.linear(x, 4)
        assert relative(added, x @ down.T @ up.T * 0.25) < 2e-3
        for copied in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
            assert torch.equal(copied.product(x), adapter.product(x))
        up.mul_(-3)
    for wrong in ((down, up[:, :3]), (down * float("nan"), up), (down[:0], up[:, :0])):
        with pytest.raises(PolybitError):
            Adapter(*wrong)


@pytest.mark.parametrize("isa, name", ISAS)
def test_a_bundle_gives_the_numbers_of_separate_calls(isa, name):
    """Bit for bit: members of different sizes, widths per group, ragged storage, biases, adapters."""
    members = [
        Prepared(random_planes(37, 300, seed=1), isa),
        Prepared(random_planes(16, 300, 6, asymmetric=True, seed=2), isa),
        Prepared(pack(ragged_weight(53, 300, (4, 3, 8, 3, 1))), isa),
        Prepared(random_planes(20, 300, ratios=range(1, 8), seed=3), isa),
    ]
    bundle = Bundle(members)
    adapters = [random_adapter(37, 300), None, random_adapter(53, 300, 5), None]
    biases = [random_input(37), None, None, random_input(20)]
    for widths in ((4, 3, 8, 2), ((4, 3, 4, 5, 4), 6, 3, (4, 3, 4, 5, 4)), ((1, 8, 1, 8, 1), 1, 4, (2, 2, 3, 3, 4))):
        for tokens in (1, 2, 7, 40):
            for arithmetic in ("int8", "int16"):
                x = random_input(tokens, 300)
                together = bundle.linear(x, widths, biases, arithmetic, adapters)
                for member, width, bias, adapter, y in zip(members, widths, biases, adapters, together, strict=True):
                    assert torch.equal(y, member.linear(x, width, bias, arithmetic, adapter)), (name, widths, tokens)
    nothing = bundle.linear(random_input(0, 300), (4, 4, 4, 4), biases)
    assert [y.shape for y in nothing] == [(0, 37), (0, 16), (0, 53), (0, 20)]


def test_a_bundle_of_weights_that_scale_their_columns():
    p = [random_planes(rows, 96, column_scale=True, seed=4) for rows in (16, 32)]
    x = random_input(3, 96)
    other = random_planes(16, 96, column_scale=True, seed=5)
    # the same draws in another order of sizes: make the scales truly equal
    same = [Prepared(replace(q, column_scale=p[0].column_scale)) for q in p]
    for y, member in zip(Bundle(same).linear(x, (4, 3), (None, None)), same, strict=True):
        assert torch.equal(y, member.linear(x, 4 if member is same[0] else 3))
    assert not Bundle.fits([Prepared(p[0]), Prepared(other)])
    assert not Bundle.fits([Prepared(p[0]), Prepared(random_planes(16, 96))])
    assert not Bundle.fits([Prepared(random_planes(16, 96)), Prepared(random_planes(16, 128))])
    assert not Bundle.fits([Prepared(random_planes(16, 96)), Prepared(random_planes(16, 96, group_size=32))])
    assert not Bundle.fits([Prepared(random_planes(16, 96, group_size=16))] * 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("isa, name", ISAS)
def test_a_spoiled_token_spoils_only_itself(isa, name, bad):
    """In ragged weights, in one call for several weights, with adapters."""
    members = [Prepared(pack(ragged_weight(53, 300, (4, 3, 8, 3, 1))), isa), Prepared(random_planes(37, 300), isa)]
    arguments = ((3, (4, 3, 4, 5, 4)), (None, None), "int8", (random_adapter(53, 300), None))
    for tokens in (5, 40):
        x = random_input(tokens, 300)
        clean = Bundle(members).linear(x, *arguments)
        x[2, 70] = bad
        for y, expected in zip(Bundle(members).linear(x, *arguments), clean, strict=True):
            assert y[2].isnan().all()
            keep = [i for i in range(tokens) if i != 2]
            assert torch.equal(y[keep], expected[keep])


def test_threads_do_not_change_the_result():
    members = [Prepared(pack(ragged_weight(700, 320, (4, 3, 8, 3, 1)))), Prepared(random_planes(512, 320))]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for tokens in (1, 40):
                x, adapters = random_input(tokens, 320), (random_adapter(700, 320), None)
                results.append(Bundle(members).linear(x, (8, (4, 3, 4, 5, 4)), (None, None), "int16", adapters))
    finally:
        torch.set_num_threads(before)
    for i in (0, 1):
        assert all(torch.equal(a, b) for k in (2, 4) for a, b in zip(results[i], results[i + k], strict=True))


def test_a_bundle_after_a_member_forgot_its_readings():
    members = [Prepared(random_planes(20, 192)), Prepared(random_planes(16, 192, seed=2))]
    bundle, x = Bundle(members), random_input(1, 192)
    for i in range(150):
        widths = (1 + i % 8, 1 + i // 8 % 8, 1 + i // 64)
        y = bundle.linear(x, (widths, widths), (None, None))[0]
        assert torch.equal(y, Prepared(members[0].planes).linear(x, widths))


def test_a_bundle_refuses_what_its_members_refuse():
    members = [Prepared(random_planes(20, 96)), Prepared(random_planes(16, 96))]
    x = random_input(2, 96)
    for arguments in ((x[:, :95], (4, 4)), (x.double(), (4, 4)), (x, (4, 9)), (x, (0, 4)), (x, ((4, 4, 4), 4))):
        with pytest.raises(PolybitError):
            Bundle(members).linear(*arguments, (None, None))


def test_what_the_kernels_cannot_do_goes_to_the_operator():
    p = random_planes(20, 96, group_size=16)
    assert Prepared(p).layer is None
    x = random_input(2, 96)
    assert torch.equal(Prepared(p).linear(x, 4, None, "int8"), ops.linear(x, p, 4, arithmetic="int8"))
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
    assert torch.equal(second.linear(x, 4), ops.linear(x, other, 4, arithmetic="int16"))
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
