"""Widths per group of columns: stored (ragged) and at run time (elastic), every path against the slow twin."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polybit.core.affine import QWeight, centre, storable_scale
from polybit.core.planes import pack, parts, read_widths, storable_ratio, unpack
from polybit.core.runtime import PolybitError
from polybit.kernels import cpu, ops, reference
from polybit.kernels.prepared import Prepared
from tests.kernels.test_ops import ISAS, KINDS, random_input, random_planes, relative, run_on


def ragged_weight(rows, columns, bits_G, group_size=64, *, asymmetric=False, ratios=(), column_scale=False, seed=0):
    """A QWeight with a width per group and every optional part on demand."""
    draw = torch.Generator().manual_seed(seed)
    groups, bits = len(bits_G), max(bits_G)
    top_G = (1 << torch.tensor(bits_G)) - 1
    limit = top_G.repeat_interleave(group_size)[:columns] + 1
    codes = (torch.rand(rows, columns, generator=draw) * limit).floor().to(torch.uint8)
    scale = storable_scale((torch.rand(rows, groups, generator=draw) + 0.1) * 0.01)
    zero = (
        (torch.rand(rows, groups, generator=draw) * (top_G + 1)).floor() if asymmetric else torch.tensor(centre(bits))
    )
    tables = {
        b: torch.tensor(1.25) if b == 3 else storable_ratio(torch.rand(rows, groups, generator=draw) + 0.5)
        for b in ratios
    }
    columns_by = (torch.rand(columns, generator=draw) + 0.5).half().float() if column_scale else None
    return QWeight(codes, scale, zero, bits, group_size, tables, columns_by, torch.tensor(bits_G, dtype=torch.uint8))


RAGGED = {64: (4, 3, 8, 3, 1), 32: (2, 5, 2, 2, 7, 3, 3, 3, 8, 6), 128: (3, 6, 3), 256: (2, 5)}


@pytest.mark.parametrize("group_size", RAGGED)
@pytest.mark.parametrize("kind", KINDS)
def test_pack_gives_back_every_bit(kind, group_size):
    q = ragged_weight(37, 300, RAGGED[group_size], group_size, **KINDS[kind])
    p = pack(q)
    back = unpack(p)
    assert torch.equal(back.codes_OI, q.codes_OI) and torch.equal(back.scale_OG, q.scale_OG)
    assert torch.equal(back.zero, q.zero) and torch.equal(back.bits_G, q.bits_G)
    assert all(torch.equal(back.ratios[b], r) for b, r in q.ratios.items())
    for width in range(1, q.bits + 1):
        assert torch.equal(unpack(p, width).dequantize(width), q.dequantize(width))


def test_only_the_bits_of_a_group_are_stored():
    q = ragged_weight(64, 512, (4, 3) * 4)
    p = pack(q)
    assert p.planes.numel() == 64 * 512 * 3.5 / 8
    assert [part.bits for part in parts(p)] == [4, 3]
    assert p.nbytes() == p.planes.numel() + 2 * 64 * 8
    assert p.nbytes(3) == 64 * 512 * 3 // 8 + 2 * 64 * 8
    assert p.nbytes(8) == p.nbytes()
    even = pack(replace(q, bits_G=None))
    assert even.nbytes([4, 2] * 4) == 64 * 512 * 3 // 8 + 2 * 64 * 8


@pytest.mark.parametrize("isa, name", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arithmetic", ["int8", "int16"])
def test_ragged_equals_its_reference(isa, name, kind, arithmetic):
    bias = random_input(37, seed=2)
    for group_size, bits_G in RAGGED.items():
        p = pack(ragged_weight(37, 300, bits_G, group_size, **KINDS[kind]))
        for tokens in (1, 2, 5, 33):
            x = random_input(tokens, 300)
            for width in (1, 3, p.bits):
                exact = reference.linear(x.double(), p, width, bias, arithmetic=arithmetic, precision=torch.float64)
                y = run_on(isa, x, p, width, bias, arithmetic)
                assert relative(y, exact) <= 1e-6, (name, tokens, width)


@pytest.mark.parametrize("isa, name", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_elastic_equals_its_reference(isa, name, kind):
    """One nested weight, each group read at its own width; also on top of ragged storage."""
    bias = random_input(37, seed=2)
    for group_size, bits_G in RAGGED.items():
        even = random_planes(37, 300, 8, group_size, **KINDS[kind])
        ragged = pack(ragged_weight(37, 300, bits_G, group_size, **KINDS[kind]))
        for p, widths in ((even, bits_G), (ragged, tuple(reversed(bits_G))), (even, (4,) * len(bits_G))):
            for tokens in (1, 4, 17):
                x = random_input(tokens, 300)
                exact = reference.linear(x.double(), p, widths, bias, arithmetic="int16", precision=torch.float64)
                assert relative(run_on(isa, x, p, widths, bias, "int16"), exact) <= 1e-6, (name, tokens, widths)


@pytest.mark.parametrize("isa, name", ISAS)
def test_decode_is_bit_exact(isa, name):
    for kind in KINDS.values():
        for group_size, bits_G in RAGGED.items():
            q = ragged_weight(37, 300, bits_G, group_size, **kind)
            p = pack(q)
            for width in range(1, q.bits + 1):
                assert torch.equal(cpu.decode(cpu.make_layer(p, isa), p, width), q.dequantize(width)), (name, width)
            even = random_planes(37, 300, 8, group_size, **kind)
            expected = unpack(even).dequantize(torch.tensor(bits_G))
            assert torch.equal(cpu.decode(cpu.make_layer(even, isa), even, bits_G), expected)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 400),
    tokens=st.integers(1, 40),
    group_size=st.sampled_from([32, 64, 128, 256]),
    stored=st.booleans(),
    kind=st.sampled_from(sorted(KINDS)),
    arithmetic=st.sampled_from(["float", "int8", "int16"]),
    data=st.data(),
)
def test_any_shape(rows, columns, tokens, group_size, stored, kind, arithmetic, data):
    groups = -(-columns // group_size)
    widths = st.lists(st.integers(1, 8), min_size=groups, max_size=groups)
    bits_G = tuple(data.draw(widths)) if stored else (8,) * groups
    p = pack(ragged_weight(rows, columns, bits_G, group_size, **KINDS[kind]))
    read = data.draw(st.one_of(st.integers(1, p.bits), widths))
    x = random_input(tokens, columns)
    exact = reference.linear(x.double(), p, read, arithmetic=arithmetic, precision=torch.float64)
    added = float(x.double().abs().sum(-1).max() * ops.decode(p, read).abs().max())
    results = [ops.linear(x, p, read, arithmetic=arithmetic)]
    if arithmetic != "float":
        isa = data.draw(st.sampled_from(ISAS))[0]
        results.append(run_on(isa, x, p, read, arithmetic=arithmetic))
        results.append(Prepared(p, isa).linear(x, tuple(read) if isinstance(read, list) else read, None, arithmetic))
    for y in results:
        assert float((y.double() - exact).abs().max()) <= 3e-7 * added


def test_equal_widths_are_the_plain_product():
    p, x = random_planes(37, 300), random_input(3, 300)
    for arithmetic in ops.MODES:
        plain = ops.linear(x, p, 4, arithmetic=arithmetic)
        assert torch.allclose(ops.linear(x, p, [4] * 5, arithmetic=arithmetic), plain, atol=1e-6)
        assert torch.allclose(
            ops.linear(x, p, [0, 4, 4, 4, 9], arithmetic=arithmetic),
            ops.linear(x, p, [1, 4, 4, 4, 8], arithmetic=arithmetic),
        )


def test_groups_of_16_are_read_by_the_slow_twin():
    p, x = random_planes(20, 96, 8, 16), random_input(2, 96)
    widths = [2, 3, 4, 5, 6, 7]
    expected = reference.linear(x, p, widths, arithmetic="int8")
    assert torch.equal(ops.linear(x, p, widths, arithmetic="int8"), expected)
    with pytest.raises(PolybitError, match="32 to 256 columns"):
        pack(ragged_weight(20, 96, (2, 3, 4, 5, 6, 7), 16))


def test_refuses():
    p, x = random_planes(20, 200), random_input(2, 200)
    for wrong in ([4, 4], [4] * 5, ()):
        with pytest.raises(PolybitError, match="4 groups"):
            ops.linear(x, p, wrong, arithmetic="int8")
        with pytest.raises(PolybitError, match="4 groups"):
            ops.decode(p, wrong)
        with pytest.raises(PolybitError, match="4 groups"):
            Prepared(p).linear(x, tuple(wrong))
    ragged = pack(ragged_weight(20, 200, (3, 4, 3, 4)))
    for width in (0, 5):
        with pytest.raises(PolybitError, match="choose 1 to 4"):
            ops.linear(x, ragged, width)
        with pytest.raises(PolybitError, match="choose 1 to 4"):
            ops.decode(ragged, width)
    cut = replace(ragged, planes=ragged.planes[:-1])
    assert not cpu.fits(cut)
    with pytest.raises(PolybitError, match="zero points"):
        q = ragged_weight(20, 200, (3, 4, 3, 4), asymmetric=True)
        pack(replace(q, zero=torch.full_like(q.zero, 15)))


def test_opcheck():
    even = random_planes(20, 96, group_size=32, **KINDS["everything"])
    ragged = pack(ragged_weight(20, 96, (4, 2, 3), 32, ratios=(2, 3)))
    for p, widths in ((even, (8, 3, 4)), (ragged, (3, 2, 3))):
        for mode in (0, 16):
            arguments = (random_input(3, 96), None, mode, list(widths), *p.apart())
            torch.library.opcheck(torch.ops.polybit.linear.default, arguments)


def test_a_layer_forgets_readings_that_pile_up():
    p, x = random_planes(20, 192), random_input(1, 192)
    prepared = Prepared(p)
    for i in range(200):
        widths = (1 + i % 8, 1 + i // 8 % 8, 1 + i // 64)
        assert relative(prepared.linear(x, widths), reference.linear(x, p, widths, arithmetic="int16")) <= 1e-5
    assert len(prepared.numbers) <= 64
    assert read_widths(p, 4) == (4, 4, 4)
