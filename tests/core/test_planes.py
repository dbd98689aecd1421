"""Planes: property tests – pack inverts unpack, a width reads only its planes, the layout is as documented."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polybit.core import planes
from polybit.core.affine import Grid, QWeight, centre, encode, expand_groups, storable_scale
from polybit.core.planes import Planes, pack, storable_ratio, unpack
from polybit.core.runtime import PolybitError


def random_qweight(rows, columns, bits, group_size, asymmetric, seed=0, ratio_widths=()):
    draw = torch.Generator().manual_seed(seed)
    groups = Grid(bits, group_size).groups(columns)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=draw, dtype=torch.uint8)
    scale = storable_scale(torch.randn(rows, groups, generator=draw) * 0.01)
    zero = torch.tensor(centre(bits))
    if asymmetric:
        zero = torch.randint(0, 1 << bits, (rows, groups), generator=draw).float()
    ratios = {b: storable_ratio(torch.rand(rows, groups, generator=draw) + 0.5) for b in ratio_widths}
    return QWeight(codes, scale, zero, bits, group_size, ratios)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 150),
    st.integers(1, 8),
    st.sampled_from([0, 32, 64, 128]),
    st.booleans(),
    st.integers(0, 9),
)
def test_unpack_inverts_pack(rows, columns, bits, group_size, asymmetric, seed):
    bits = max(bits, 2)
    q = random_qweight(rows, columns, bits, group_size, asymmetric, seed, ratio_widths=range(2, bits))
    back = unpack(pack(q))
    assert torch.equal(back.codes_OI, q.codes_OI)
    assert torch.equal(back.scale_OG, q.scale_OG)
    assert torch.equal(back.zero, q.zero)
    for b in range(2, bits + 1):
        assert torch.equal(back.dequantize(b), q.dequantize(b))


@pytest.mark.parametrize("width", range(2, 9))
def test_a_width_reads_only_its_planes(width):
    """Overwriting the unread planes with noise changes nothing."""
    packed = pack(random_qweight(33, 70, 8, 32, True, ratio_widths=(2, 3, 4)))
    expected = unpack(packed).dequantize(width)
    noisy = packed.planes.clone()
    noisy[width:] = torch.randint(0, 256, noisy[width:].shape, dtype=torch.uint8)
    damaged = planes.Planes(
        noisy, packed.scale, packed.zero, packed.gain, packed.shape, packed.group_size, packed.ratios
    )
    assert torch.equal(unpack(damaged, width).dequantize(width), expected)
    assert packed.nbytes(width) < packed.nbytes() or width == 8


def test_layout_is_the_documented_one():
    """Literal twin: the bit of every code is found at plane p, block (row/16, column/32), byte 4r+t, bit i."""
    codes = torch.randint(0, 256, (35, 75), dtype=torch.uint8)
    packed = planes.pack_codes(codes, 8)
    assert packed.shape == (8, 3, 3, 64)
    for row, column in [(0, 0), (1, 5), (15, 31), (16, 32), (34, 74), (20, 66)]:
        i, t = divmod(column % 32, 4)
        byte = packed[:, row // 16, column // 32, 4 * (row % 16) + t]
        bits = [(int(b) >> i) & 1 for b in byte]
        assert int("".join(map(str, bits)), 2) == int(codes[row, column])


def test_dequantize_is_the_formula():
    """s * (2^(B-b) r_b (p_b - c_b) + c_B - z), one weight at a time."""
    q = random_qweight(5, 50, 8, 32, True, ratio_widths=(3,))
    for width in (8, 5, 3):
        got = q.dequantize(width)
        for row, column in [(0, 0), (4, 31), (2, 32), (3, 49)]:
            g = column // 32
            s, z = float(q.scale_OG[row, g]), float(q.zero[row, g])
            r = float(q.ratios[3][row, g]) if width == 3 else 1.0
            p = int(q.codes_OI[row, column]) >> (8 - width)
            want = s * (2 ** (8 - width) * r * (p - (2**width - 1) / 2) + 127.5 - z)
            assert float(got[row, column]) == pytest.approx(want, rel=1e-5, abs=1e-7)
    assert torch.allclose(
        q.dequantize(), expand_groups(q.scale_OG, 50, 32) * (q.codes_OI - expand_groups(q.zero, 50, 32))
    )


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e30])
def test_scales_of_any_size_are_stored_well(size):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)) * size
    scale = storable_scale(weight.abs().amax(1, keepdim=True) / 127.5)
    zero = torch.tensor(centre(8))
    q = QWeight(encode(weight, scale, zero, 8, 0), scale, zero, 8, 0)
    back = unpack(pack(q)).dequantize()
    assert torch.isfinite(back).all()
    assert float((back - weight).abs().max()) < 0.02 * size


def test_what_cannot_be_stored_is_refused():
    q = random_qweight(4, 32, 4, 32, False)
    with pytest.raises(PolybitError, match="storable"):
        pack(QWeight(q.codes_OI, q.scale_OG * 1.0001, q.zero, 4, 32))
    with pytest.raises(PolybitError, match="integers"):
        pack(QWeight(q.codes_OI, q.scale_OG, torch.full_like(q.scale_OG, 1.5), 4, 32))
    with pytest.raises(PolybitError, match="width 5"):
        unpack(pack(q), 5)


@pytest.mark.parametrize("bits_G", [None, (8, 3, 5)])
@pytest.mark.parametrize("zero", ["group", "one"])
def test_taken_apart_and_put_together(bits_G, zero):
    """The same Planes over the same memory, whole or as far as one width needs them."""
    groups = 3
    codes = torch.zeros(20, 96, dtype=torch.uint8)
    point = torch.full((20, groups), 2.0) if zero == "group" else torch.tensor(3.5)
    tables = {4: torch.tensor(1.25), 3: storable_ratio(torch.rand(20, groups) + 0.5)}
    stored = None if bits_G is None else torch.tensor(bits_G, dtype=torch.uint8)
    p = pack(QWeight(codes, torch.full((20, groups), 0.5), point, 8, 32, tables, torch.ones(96), stored))
    again = Planes.together(*p.apart())
    assert again.planes is p.planes and again.scale is p.scale and again.column_scale is p.column_scale
    assert (again.zero is p.zero or again.zero == p.zero) and again.bits_G == p.bits_G == bits_G
    assert again.shape == p.shape and again.gain == p.gain and again.ratios == p.ratios
    assert Planes.together(*p.apart(3)).ratios == {3: p.ratios[3]} and not Planes.together(*p.apart(8)).ratios
