"""polybit::linear: reference tests of every path against the slow twin, property tests, the operator's contract."""

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polybit.core.affine import QWeight, centre, storable_scale
from polybit.core.planes import Planes, RatioTable, pack, storable_ratio, unpack
from polybit.core.runtime import PolybitError
from polybit.kernels import cpu, extensions, ops, reference
from polybit.kernels.prepared import Prepared

ISAS = list(enumerate(cpu.instruction_sets()))
TOLERANCE = {"int8": 1.5e-2, "int16": 1e-4}  # largest error over largest output


def random_planes(rows, columns, bits=8, group_size=64, *, asymmetric=False, ratios=(), column_scale=False, seed=0):
    """Planes with every optional part on demand; ratios: widths that get a table, width 3 a single number."""
    draw = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size) if group_size else 1
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=draw, dtype=torch.uint8)
    scale = storable_scale((torch.rand(rows, groups, generator=draw) + 0.1) * 0.01)
    zero = torch.tensor(centre(bits))
    if asymmetric:
        low = (1 << bits) // 4
        zero = torch.randint(low, 3 * low + 1, (rows, groups), generator=draw).float()
    tables = {
        b: torch.tensor(1.25) if b == 3 else storable_ratio(torch.rand(rows, groups, generator=draw) + 0.5)
        for b in ratios
    }
    columns_by = (torch.rand(columns, generator=draw) + 0.5).half().float() if column_scale else None
    return pack(QWeight(codes, scale, zero, bits, group_size, tables, columns_by))


def random_input(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(y, expected):
    """Largest error, in units of the largest expected output."""
    return float((y.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))


def run_on(isa, x, p, width, bias=None, arithmetic="int8"):
    """polybit::linear on one instruction set, past the dispatcher."""
    assert cpu.fits(p)
    return cpu.multiply(cpu.make_layer(p, isa), x, p, width, bias, ops.MODES[arithmetic] // 8)


KINDS = {
    "plain": {},
    "zero": {"asymmetric": True},
    "ratio": {"ratios": range(1, 8)},
    "everything": {"asymmetric": True, "ratios": range(1, 8), "column_scale": True},
}


@pytest.mark.parametrize("isa, name", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arithmetic", ["int8", "int16"])
def test_integer_path_equals_its_reference(isa, name, kind, arithmetic):
    """Every width, several tile sizes: the same rounded activations times the same weight, to 1e-6 in float64."""
    p = random_planes(37, 300, group_size=64, **KINDS[kind])
    bias = random_input(37, seed=2)
    for tokens in (1, 2, 5, 8, 33):
        x = random_input(tokens, 300)
        for width in range(1, 9):
            exact = reference.linear(x.double(), p, width, bias, arithmetic=arithmetic, precision=torch.float64)
            y = run_on(isa, x, p, width, bias, arithmetic)
            assert relative(y, exact) <= 1e-6, (name, tokens, width)


@pytest.mark.parametrize("isa, name", ISAS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_stored_widths(isa, name, bits):
    """A checkpoint may store fewer than eight planes."""
    p = random_planes(20, 96, bits, 32, asymmetric=True, ratios=range(1, bits))
    x = random_input(3, 96)
    for width in range(1, bits + 1):
        exact = reference.linear(x.double(), p, width, arithmetic="int8", precision=torch.float64)
        assert relative(run_on(isa, x, p, width), exact) <= 1e-6


@pytest.mark.parametrize("arithmetic", ["float", "int8", "int16"])
def test_float16_overflows_to_infinity(arithmetic):
    """As torch's own products do: summed in float32, rounded once at the end, 65,520 and more to infinity."""
    p, x = random_planes(37, 300), random_input(3, 300).mul(1e4).half()
    ways = [lambda x: ops.linear(x, p, 8, arithmetic=arithmetic)]
    ways += [
        lambda x: reference.linear(x, p, 8, arithmetic=arithmetic),
        lambda x: Prepared(p).linear(x, 8, None, arithmetic),
    ]
    if arithmetic != "float":
        ways += [lambda x, isa=isa: run_on(isa, x, p, 8, None, arithmetic) for isa, _ in ISAS]
    for way in ways:
        y, wide = way(x), way(x.float())
        assert torch.equal(y, wide.half())
        assert torch.equal(y.isinf(), wide.abs() >= 65520) and 0 < int(y.isinf().sum()) < y.numel()
    if arithmetic == "float":
        theirs, near = (
            torch.nn.functional.linear(x, unpack(p, 8).dequantize(8).half()),
            (wide.abs() - 65520).abs() < 300,
        )
        assert torch.equal(theirs.isinf() & ~near, y.isinf() & ~near)


@pytest.mark.parametrize("isa, name", ISAS)
def test_decode_is_bit_exact(isa, name):
    for kind in KINDS.values():
        for group_size in (0, 32, 256):
            p = random_planes(37, 300, group_size=group_size, **kind)
            for width in range(1, 9):
                assert torch.equal(cpu.decode(cpu.make_layer(p, isa), p, width), unpack(p, width).dequantize(width)), (
                    name,
                    width,
                )


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 400),
    tokens=st.integers(1, 40),
    width=st.integers(1, 8),
    spare=st.integers(0, 6),
    group_size=st.sampled_from([0, 16, 32, 64, 128, 256]),
    kind=st.sampled_from(sorted(KINDS)),
    arithmetic=st.sampled_from(["float", "int8", "int16"]),
    dtype=st.sampled_from(ops.FLOATS),
    data=st.data(),
)
def test_any_shape(rows, columns, tokens, width, spare, group_size, kind, arithmetic, dtype, data):
    """Whatever the shape, every instruction set agrees with the slow twin."""
    p = random_planes(rows, columns, max(2, min(8, width + spare)), group_size, **KINDS[kind])
    x = random_input(tokens, columns, dtype=dtype)
    exact = reference.linear(x.double(), p, width, arithmetic=arithmetic, precision=torch.float64)
    stored = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype] * float(exact.abs().max())
    # products may cancel: float32 arithmetic errs in proportion to what was added up
    added = float(x.double().abs().sum(-1).max() * unpack(p).dequantize(width).abs().max())
    results = [ops.linear(x, p, width, arithmetic=arithmetic)]
    if arithmetic != "float" and group_size != 16:
        results.append(run_on(data.draw(st.sampled_from(ISAS))[0], x, p, width, arithmetic=arithmetic))
    for y in results:
        assert y.dtype == dtype and y.shape == (tokens, rows)
        assert float((y.double() - exact).abs().max()) <= stored + 3e-7 * added


@pytest.mark.parametrize("arithmetic", TOLERANCE)
@pytest.mark.parametrize("group_size", [0, 32, 64, 128])
def test_error_of_rounded_activations(arithmetic, group_size):
    """paper-free bound of the design: 8-bit activations 1.5e-2, 16-bit 1e-4 of the float product."""
    p = random_planes(256, 1024, group_size=group_size)
    x = random_input(4, 1024)
    for width in range(2, 9):
        exact = x.double() @ unpack(p).dequantize(width).double().T
        assert relative(ops.linear(x, p, width, arithmetic=arithmetic), exact) <= TOLERANCE[arithmetic]


def test_float_activations_use_the_decoded_weight():
    p = random_planes(37, 300, **KINDS["everything"])
    x = random_input(2, 3, 300)
    for width in range(1, 9):
        expected = torch.nn.functional.linear(x, unpack(p).dequantize(width))
        assert torch.equal(ops.linear(x, p, width), expected)


def test_gradient_reaches_the_input():
    p = random_planes(8, 64)
    x = random_input(2, 64).requires_grad_()
    ops.linear(x, p, 4).sum().backward()
    assert torch.allclose(x.grad, unpack(p).dequantize(4).sum(0).expand(2, -1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("isa, name", ISAS)
def test_a_spoiled_token_spoils_only_itself(isa, name, bad):
    p = random_planes(20, 200)
    x = random_input(5, 200)
    clean = {a: run_on(isa, x, p, 4, None, a) for a in TOLERANCE}
    x[2, 70] = bad
    for arithmetic, expected in clean.items():
        y = run_on(isa, x, p, 4, None, arithmetic)
        assert y[2].isnan().all()
        keep = [0, 1, 3, 4]
        assert torch.equal(y[keep], expected[keep])


@pytest.mark.parametrize("isa, name", ISAS)
def test_extreme_sizes_of_activations(isa, name):
    """Zeros, denormals and very large inputs neither overflow nor trap."""
    p = random_planes(20, 128)
    for value in (0.0, 1e-42, 1e-31, 1e32):
        for arithmetic in TOLERANCE:
            y = run_on(isa, torch.full((2, 128), value), p, 3, None, arithmetic)
            exact = torch.full((2, 128), value).double() @ unpack(p).dequantize(3).double().T
            assert y.isfinite().all()
            assert float((y - exact).abs().max()) <= max(1e-6 * float(exact.abs().max()), 1e-28)


def test_layouts_of_the_input():
    """Strided input, leading axes, no tokens at all."""
    p = random_planes(20, 96)
    x = random_input(96, 4).T
    assert not x.is_contiguous()
    for arithmetic in ops.MODES:
        y = ops.linear(x, p, 4, arithmetic=arithmetic)
        again = ops.linear(x.contiguous(), p, 4, arithmetic=arithmetic)
        # a dense product of floats may sum in another order for another layout
        assert torch.allclose(y, again, rtol=1e-5, atol=1e-5) if arithmetic == "float" else torch.equal(y, again)
        assert torch.equal(ops.linear(x.view(2, 2, 96), p, 4, arithmetic=arithmetic), y.view(2, 2, 20))
        assert ops.linear(x[:0], p, 4, arithmetic=arithmetic).shape == (0, 20)
        assert torch.equal(
            ops.linear(x[0], p, 4, arithmetic=arithmetic), ops.linear(x[:1], p, 4, arithmetic=arithmetic)[0]
        )


def test_threads_do_not_change_the_result():
    p = random_planes(1024, 512)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([ops.linear(random_input(m, 512), p, 5, arithmetic="int16") for m in (1, 40)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_opcheck():
    p = random_planes(20, 96, **KINDS["everything"])
    for mode in (0, 8, 16):
        arguments = (random_input(3, 96), random_input(20), mode, [4], *p.apart(4))
        torch.library.opcheck(torch.ops.polybit.linear.default, arguments)


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    p = random_planes(20, 96)
    compiled = torch.compile(lambda x, width: ops.linear(x, p, width, arithmetic="int8") * 2, fullgraph=True)
    for width in (4, 3):
        x = random_input(3, 96)
        assert torch.equal(compiled(x, width), ops.linear(x, p, width, arithmetic="int8") * 2)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"x": torch.zeros(2, 95)}, "last axis must be 96"),
        ({"x": torch.zeros(2, 96, dtype=torch.float64)}, "float64"),
        ({"x": torch.zeros(2, 96, dtype=torch.int32)}, "int32"),
        ({"x": torch.zeros(())}, "last axis"),
        ({"width": 0}, "choose 1 to 8"),
        ({"width": 9}, "choose 1 to 8"),
        ({"bias": torch.zeros(19)}, "shape \\(20,\\)"),
        ({"bias": torch.zeros(20).int()}, "shape \\(20,\\)"),
        ({"bias": torch.zeros(20, device="meta")}, "bias is on meta"),
        ({"arithmetic": "int4"}, "'int8'"),
        ({"x": torch.zeros(2, 96, device="meta")}, "meta"),
    ],
)
def test_refuses(change, words):
    arguments = {"x": torch.zeros(2, 96), "planes": random_planes(20, 96), "width": 4, **change}
    with pytest.raises(PolybitError, match=words):
        ops.linear(**arguments)


def test_misshapen_storage_never_reaches_the_kernels():
    p = random_planes(20, 96)
    assert cpu.fits(p)
    for wrong in (
        {"planes": p.planes[:, :, :2]},
        {"planes": p.planes.short()},
        {"scale": p.scale.float()},
        {"scale": p.scale[:1]},
        {"zero": p.scale},
        {"ratios": {4: RatioTable(0.5, 1.0, p.planes[0, :, 0])}},
        {"column_scale": torch.ones(95).half()},
        {"shape": (33, 96)},
        {"group_size": 16},
        {"bits_G": (8, 4)},
    ):
        assert not cpu.fits(replace(p, **wrong)), wrong
        assert cpu.make_layer(replace(p, **wrong)) is None


def test_without_the_library_the_slow_twin_serves_and_says_so(monkeypatch):
    p, x = random_planes(20, 96), random_input(2, 96)
    expected = reference.linear(x, p, 4, arithmetic="int8")
    monkeypatch.setitem(__import__("sys").modules, "polybit.kernels._cpu", None)
    monkeypatch.delattr("polybit.kernels._cpu", raising=False)
    cpu.library.cache_clear()
    extensions.missing.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="without its compiled kernels"):
            y = ops.linear(x, p, 4, arithmetic="int8")
        assert torch.equal(y, expected)
        assert ops.best_arithmetic() == "float"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.linear(x, p, 4, arithmetic="int8")
        assert len(extensions.missing()) == 1
        monkeypatch.setitem(__import__("sys").modules, "polybit.kernels._step", None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the next part that is missing says nothing more
            assert extensions.extension("_step") is None
    finally:
        cpu.library.cache_clear()
        extensions.missing.cache_clear()


def test_rows_cut_out_of_a_larger_weight():
    """Planes may be any distance apart: a slice of row blocks is read in place."""
    p, x = random_planes(64, 96), random_input(3, 96)
    cut = Planes(p.planes[:, 1:3], p.scale[1:3], p.zero, p.gain, (32, 96), p.group_size)
    assert cpu.fits(cut)
    for arithmetic in ops.MODES:
        whole = ops.linear(x, p, 5, arithmetic=arithmetic)
        assert torch.allclose(ops.linear(x, cut, 5, arithmetic=arithmetic), whole[:, 16:48], rtol=1e-5, atol=1e-6)
